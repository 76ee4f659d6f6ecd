"""What is installed and live, as rows for people and programs. Works without an agent."""

from collections import defaultdict
from collections.abc import Iterable

import msgspec

from sockhop.agent.installed import read_installed, read_members, read_services
from sockhop.agent.plan import scope_of
from sockhop.agent.state import Override
from sockhop.agent.target import split_service_port
from sockhop.datapath.balancer import BalanceMaps
from sockhop.kernel.netns import current_cookie
from sockhop.model import Frontend, Protocol, unpack_address

__all__ = [
    "BackendRow",
    "ServiceRow",
    "list_backends",
    "list_services",
]

_PROTOCOLS = {protocol.number: protocol for protocol in Protocol}


class ServiceRow(msgspec.Struct):
    """A frontend of a service.

    `scope`: the network namespaces where it holds, see :func:`scope_of`; `netns_cookie`: of the
    one namespace where it holds, else 0.
    """

    service: str
    port_name: str
    frontend: str
    scope: str
    type: str
    algorithm: str
    affinity_seconds: int
    backends: int
    connects: int
    no_backend: int
    netns_cookie: int
    generation: int
    id: int


class BackendRow(msgspec.Struct):
    """A backend of a service. `live`: sockets that may still be open to it, never too few.

    `by_hand`: whether somebody has given it its state by hand.
    """

    service: str
    port_name: str
    backend: str
    protocol: str
    state: str
    weight: int
    live: int
    id: int
    by_hand: bool = False


def list_services(maps: BalanceMaps) -> list[ServiceRow]:
    """Return the frontends that are installed, by service."""
    rows, own_cookie = [], current_cookie()
    entries = read_installed(maps).entries
    all_counters = maps.counters.get_many(old.id for old in entries.values())
    for key, old in entries.items():
        counters = all_counters.get(old.id)
        frontend = Frontend(unpack_address(key.address), key.port, _PROTOCOLS[key.protocol])
        rows.append(
            ServiceRow(
                *split_service_port(old.entry.service),
                frontend=str(frontend),
                scope=scope_of(key, old.entry.flags, own_cookie),
                type=old.entry.type,
                algorithm=old.entry.algorithm,
                affinity_seconds=old.entry.affinity,
                backends=len(old.entry.backends),
                connects=counters.connects if counters else 0,
                no_backend=counters.no_backend if counters else 0,
                netns_cookie=key.netns,
                generation=old.generation,
                id=old.id,
            )
        )
    return sorted(rows, key=lambda row: (row.service, row.frontend, row.netns_cookie))


def list_backends(maps: BalanceMaps, overrides: Iterable[Override] = ()) -> list[BackendRow]:
    """Return the backends of all services, with their live sockets and what was said by hand."""
    said = {(each.service, each.address, each.port) for each in overrides}
    live: defaultdict[int, int] = defaultdict(int)
    for key, count in maps.live.items():
        live[key.backend] += count
    rows = [
        BackendRow(
            *split_service_port(member.service),
            backend=str(old.backend),
            protocol=member.protocol,
            state=old.backend.state,
            weight=old.backend.weight,
            live=live[old.id],
            id=old.id,
            by_hand=(split_service_port(member.service)[0], member.address, member.port) in said,
        )
        for member, old in read_members(maps, read_services(maps)).items()
    ]
    return sorted(rows, key=lambda row: (row.service, row.backend, row.protocol))
