"""Clients that know nothing of sockhop: unserved without it, served by every backend with it."""

import contextlib
import functools
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.clients import dialers, servers
from tests.clients.dialers import Unserved
from tests.clients.servers import Pair
from tests.sandbox import Sandbox, compact

pytestmark = pytest.mark.kernel

VIP, VIP6, VIP6_TO_IPV4 = "10.96.0.10", "fd00:96::10", "fd00:96::20"
DIALLED = {
    "IPv4": VIP,
    "IPv6": VIP6,
    "mapped": f"::ffff:{VIP}",
    "IPv6-to-IPv4": VIP6_TO_IPV4,
}
# With two equal backends the chance that one is not met in so many connections is 2**-63.
PLENTY = 64
# ... and that a removed one that is still in use goes unnoticed, 2**-8 an address.
SOME = 8


class Client(NamedTuple):
    """How to ask, which servers answer, and the frontend's port and protocol."""

    ask: Callable[[str, int], str]
    peers: str
    port: int
    protocol: str = "tcp"
    dials: tuple[str, ...] = tuple(DIALLED.values())


CLIENTS = {
    "curl": Client(dialers.ask_curl, "nginx", 80),
    "redis-cli": Client(dialers.ask_redis_cli, "redis", 6379),
    "psql": Client(dialers.ask_psql, "postgres", 5432),
    # Since BIND 9.18 dig skips mapped addresses, and its IPV6_V6ONLY sockets reach no IPv4 backend.
    "dig": Client(dialers.ask_dig, "dnsmasq", 53, "udp", (VIP, VIP6)),
    "dig-tcp": Client(dialers.ask_dig_tcp, "dnsmasq", 53, "tcp", (VIP, VIP6)),
    # A datagram cannot cross from IPv6 to IPv4.
    "dnspython": Client(
        dialers.ask_dnspython, "dnsmasq", 53, "udp", (VIP, VIP6, DIALLED["mapped"])
    ),
    "quic": Client(dialers.ask_quic, "quic", 443, "udp", (VIP, VIP6)),
}
for how in (dialers.ask_blocking, dialers.ask_asyncio, dialers.ask_nonblocking):
    for protocol, kind in (("tcp", socket.SOCK_STREAM), ("udp", socket.SOCK_DGRAM)):
        name = f"{how.__name__.removeprefix('ask_')}-{protocol}"
        CLIENTS[name] = Client(functools.partial(how, kind=kind), protocol, 7, protocol)


@pytest.fixture(scope="module")
def node() -> Iterator[Sandbox]:
    with Sandbox(loopback=()) as made:
        yield made


@pytest.fixture(scope="module")
def peers(node: Sandbox) -> Iterator[dict[str, Pair]]:
    with contextlib.ExitStack() as stack:
        yield {
            name: stack.enter_context(started)
            for name, started in {
                "nginx": servers.nginxes(8080),
                "redis": servers.redises(6400),
                "postgres": servers.postgreses(5500),
                "dnsmasq": servers.dnsmasqs(5300),
                "quic": servers.quics(4430),
                "tcp": servers.echoes(7000, udp=False),
                "udp": servers.echoes(7000, udp=True),
            }.items()
        }


def publish(node: Sandbox, client: Client, pair: Pair, *names: str) -> Path:
    """Write the manifest in which the servers with these *names* are the client's backends."""
    service = f"{client.port}/{client.protocol}"
    return node.manifest(
        compact(
            both={
                "frontends": [f"{VIP}:{service}", f"[{VIP6}]:{service}"],
                "backends": pair.backends(*names),
            },
            crossing={
                "frontends": [f"[{VIP6_TO_IPV4}]:{service}"],
                "backends": pair.backends(*names)[::2],
            },
        )
    )


def assert_unserved(client: Client) -> None:
    for dialled in client.dials:
        begin = time.monotonic()
        with pytest.raises(Unserved):
            client.ask(dialled, client.port)
        assert time.monotonic() - begin < dialers.SECONDS + 1


def assert_all_answer(client: Client, dialled: str, expected: set[str]) -> None:
    met: set[str] = set()
    for _ in range(PLENTY):
        met.add(client.ask(dialled, client.port))
        if met >= expected:
            break
    assert met == expected


@pytest.mark.parametrize("client", CLIENTS.values(), ids=CLIENTS)
def test_story(node: Sandbox, peers: dict[str, Pair], client: Client) -> None:
    pair = peers[client.peers]
    manifest = publish(node, client, pair, "one", "two")
    assert_unserved(client)
    with node.agent(manifest) as agent:
        for dialled in client.dials:
            assert_all_answer(client, dialled, {"one", "two"})
        generation = agent.status()["generation"]
        publish(node, client, pair, "two")
        agent.wait_generation(generation)
        for dialled in client.dials:
            met = {client.ask(dialled, client.port) for _ in range(SOME)}
            assert met == {"two"}, dialled
    # SIGTERM has ended the agent, and not what it installed.
    for dialled in client.dials:
        assert client.ask(dialled, client.port) == "two"
    node.sockhop("detach")
    assert_unserved(client)
