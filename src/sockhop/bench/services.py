"""Services to measure with: the same for sockhop, nftables, haproxy and in manifests."""

import random
from collections.abc import Iterator
from typing import NamedTuple

from sockhop.bench.messages import Places
from sockhop.model import Backend, Desired, Frontend, Protocol, Service

__all__ = [
    "BACKENDS",
    "CLIENT_ADDRESS",
    "FRONTEND_PORT",
    "CLIENT_NETWORK",
    "SERVER_ADDRESS",
    "SERVICE_NETWORK",
    "ServicePort",
    "dialled",
    "desired",
    "haproxy_configuration",
    "nftables_transactions",
    "service_address",
    "service_ports",
    "services_name",
]

SERVER_ADDRESS = "10.200.0.1"
CLIENT_NETWORK = "10.200.0.0/16"
CLIENT_ADDRESS = "10.200.255.254"
SERVICE_NETWORK = "10.100.0.0/14"
FRONTEND_PORT = 80
BACKENDS = ((SERVER_ADDRESS, 9001), (SERVER_ADDRESS, 9002))
"""Where the servers listen; the backends of every service."""

_TRANSACTION = 1000
"""Services."""


class ServicePort(NamedTuple):
    """A service with the one frontend that it has, always on FRONTEND_PORT."""

    name: str
    address: str
    protocol: Protocol


def service_ports(services: int) -> list[ServicePort]:
    """Return the frontends of that many services, of TCP and UDP in turn; a single one has both."""
    if services == 1:
        return [ServicePort("s0", service_address(0), protocol) for protocol in Protocol]
    protocols = tuple(Protocol)
    return [ServicePort(f"s{i}", service_address(i), protocols[i % 2]) for i in range(services)]


def service_address(number: int) -> str:
    """Return the address of a service by its number, in SERVICE_NETWORK."""
    number += 1  # a network's first address may be taken for a broadcast
    return f"10.{100 + (number >> 16)}.{number >> 8 & 255}.{number & 255}"


def dialled(ports: list[ServicePort], protocol: Protocol, most: int, seed: int) -> Places:
    """Return up to *most* frontends of a protocol, drawn and ordered by *seed*."""
    have = [(port.address, FRONTEND_PORT) for port in ports if port.protocol is protocol]
    chosen = random.Random(seed).sample(have, min(most, len(have)))
    return Places(services_name(protocol), chosen)


def services_name(protocol: Protocol) -> str:
    """Return how :func:`dialled` names its places for a loop."""
    return f"services {protocol}"


def desired(ports: list[ServicePort]) -> Desired:
    """Return what sockhop has to install."""
    backends = tuple(Backend(*place) for place in BACKENDS)
    frontends: dict[str, list[Frontend]] = {}
    for port in ports:
        frontend = Frontend(port.address, FRONTEND_PORT, port.protocol, backends=backends)
        frontends.setdefault(port.name, []).append(frontend)
    return Desired(tuple(Service(name, tuple(having)) for name, having in frontends.items()))


def nftables_transactions(ports: list[ServicePort]) -> Iterator[str]:
    """Yield inputs for `nft -f` that lay rules out as kube-proxy's nftables mode does.

    A connection finds its service in one verdict map, a chain draws the endpoint, the endpoint's
    chain translates (kubernetes/pkg/proxy/nftables/proxier.go, KEP-3866). The filter chains that
    kube-proxy has besides, for services without endpoints and for firewalls, are not here.
    """
    yield (
        "table ip sockhop-bench {\n"
        "map service-ips { type ipv4_addr . inet_proto . inet_service : verdict; }\n"
        "chain mark-for-masquerade { mark set mark or 0x4000; }\n"
        "chain masquerading { mark and 0x4000 == 0 return; mark set mark xor 0x4000;"
        " masquerade fully-random; }\n"
        "chain services { ip daddr . meta l4proto . th dport vmap @service-ips; }\n"
        "chain nat-output { type nat hook output priority -100; jump services; }\n"
        "chain nat-postrouting { type nat hook postrouting priority 100; jump masquerading; }\n"
        "}\n"
    )
    # The kernel's time grows with the square of a transaction.
    for start in range(0, len(ports), _TRANSACTION):
        chains = "".join(map(_nftables_chains, ports[start : start + _TRANSACTION]))
        yield f"table ip sockhop-bench {{\n{chains}}}\n"
    elements = ", ".join(
        f"{port.address} . {port.protocol.lower()} . {FRONTEND_PORT} : goto {_chain(port)}"
        for port in ports
    )
    yield f"add element ip sockhop-bench service-ips {{ {elements} }}\n"


def _nftables_chains(port: ServicePort) -> str:
    protocol = port.protocol.lower()
    endpoints, verdicts = "", []
    for number, (address, backend_port) in enumerate(BACKENDS):
        chain = f"endpoint-{number}-{port.name}-{protocol}"
        verdicts.append(f"{number} : goto {chain}")
        endpoints += (
            f"chain {chain} {{ ip saddr {address} jump mark-for-masquerade; "
            f"meta l4proto {protocol} dnat to {address}:{backend_port}; }}\n"
        )
    return endpoints + (
        f"chain {_chain(port)} {{ ip daddr {port.address} {protocol} dport {FRONTEND_PORT} "
        f"ip saddr != {CLIENT_NETWORK} jump mark-for-masquerade; "
        f"numgen random mod {len(verdicts)} vmap {{ {', '.join(verdicts)} }}; }}\n"
    )


def _chain(port: ServicePort) -> str:
    return f"service-{port.name}-{port.protocol.lower()}"


def haproxy_configuration(ports: list[ServicePort]) -> str:
    """Return a haproxy configuration in TCP mode: a listener for each TCP frontend."""
    servers = "".join(
        f"    server b{number} {address}:{port}\n"
        for number, (address, port) in enumerate(BACKENDS)
    )
    # nolinger: closed by reset, as the clients do.
    return (
        "global\n    nbthread 1\n    maxconn 1000\n"
        "defaults\n    mode tcp\n    balance random\n    option nolinger\n"
        "    timeout connect 10s\n    timeout client 60s\n    timeout server 60s\n"
    ) + "".join(
        f"listen {port.name}\n    bind {port.address}:{FRONTEND_PORT}\n{servers}"
        for port in ports
        if port.protocol is Protocol.TCP
    )
