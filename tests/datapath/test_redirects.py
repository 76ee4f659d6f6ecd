"""Local redirects: whoever dials an address reaches a local backend, but for that backend."""

import contextlib
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from sockhop.datapath.records import Setting
from sockhop.kernel.cgroups import cgroup_id
from sockhop.model import Backend, Frontend, FrontendType, Protocol, Redirect, Service
from tests.datapath.node import Node, service
from tests.datapath.rules import joined, text
from tests.sandbox import ServerThread

pytestmark = pytest.mark.kernel

DNS = "10.96.0.1"
"""An address of the sandbox itself, so that it is there without any service."""

kinds = pytest.mark.parametrize("kind", ["tcp", "udp", "sendto"])


@pytest.fixture(scope="module")
def servers() -> Iterator[dict[str, ServerThread]]:
    """Who answers: the upstream at the address itself, a service's backend, a local one."""
    places = {"upstream": DNS, "behind": "127.0.1.1", "local": "127.0.1.2"}
    with contextlib.ExitStack() as stack:
        made = {}
        for name, host in places.items():
            for udp in (False, True):
                server = stack.enter_context(ServerThread(name, host, 5353, udp=udp))
                made[name + "/udp" * udp] = server
        yield made


@pytest.fixture
def exempt(node: Node) -> Iterator[Path]:
    group = node.sandbox.cgroup / "exempt"
    group.mkdir()
    yield group
    node.install()
    group.rmdir()


def redirect(*backends: str, address: str = DNS, **fields: object) -> Redirect:
    frontends = tuple(
        Frontend(
            address,
            5353,
            protocol,
            FrontendType.LOCAL_REDIRECT,
            backends=tuple(Backend(host, 5353) for host in backends),
        )
        for protocol in Protocol
    )
    return Redirect("ns/dns", frontends, **fields)  # type: ignore[arg-type]


def behind(backends: tuple[str, ...] = ("127.0.1.1:5353",)) -> Service:
    ends = f"{DNS}:5353/tcp", f"{DNS}:5353/udp"
    return service("ns/dns", *ends, backends=backends)


def ask(kind: str, host: str = DNS) -> str:
    """Dial *host* and return who answers."""
    type_ = socket.SOCK_STREAM if kind == "tcp" else socket.SOCK_DGRAM
    with socket.socket(socket.AF_INET, type_) as client:
        client.settimeout(5)
        if kind == "sendto":
            client.sendto(b"?", (host, 5353))
            data, sender = client.recvfrom(100)
            assert sender == (host, 5353)
            return data.decode()
        client.connect((host, 5353))
        assert client.getpeername() == (host, 5353)
        client.send(b"?")
        return client.recv(100).decode()


def who_answers(node: Node, exempt: Path, kind: str, *services: Service) -> tuple[str, str]:
    """Who answers anybody, and who answers sockets of the exempt cgroup."""
    made = redirect("127.0.1.2", exempt=(text(exempt),))
    node.install(*services, redirects=[made], places={text(exempt): cgroup_id(exempt)})
    with joined(text(exempt)):
        inside = ask(kind)
    return ask(kind), inside


@kinds
def test_an_address_is_redirected(node: Node, servers: object, exempt: Path, kind: str) -> None:
    assert who_answers(node, exempt, kind) == ("local", "upstream")
    assert node.maps.setting(Setting.REDIRECTS) == 1
    node.install()
    assert ask(kind) == "upstream"
    assert node.maps.setting(Setting.REDIRECTS) == 0


@kinds
def test_a_service_is_redirected(node: Node, servers: object, exempt: Path, kind: str) -> None:
    assert who_answers(node, exempt, kind, behind()) == ("local", "behind")
    node.install(behind())
    assert ask(kind) == "behind"


@kinds
def test_a_service_may_change_beneath(node: Node, servers: object, exempt: Path, kind: str) -> None:
    who_answers(node, exempt, kind, behind())
    assert who_answers(node, exempt, kind) == ("local", "upstream")
    assert who_answers(node, exempt, kind, behind()) == ("local", "behind")


MUTANT = "if (find_frontend(ctx, key, found) && is_for(ctx, found))"


def test_a_mutant_that_exempts_nobody(
    node: Node, servers: object, exempt: Path, tmp_path: Path
) -> None:
    with node.mutated(tmp_path / "m", (MUTANT, "if (find_frontend(ctx, key, found))")):
        assert who_answers(node, exempt, "tcp", behind()) == ("local", "local")


def test_redirects_to_loopback_are_local(node: Node, servers: object) -> None:
    """Elsewhere loopback is another one: there the service goes on."""
    made = redirect("127.0.1.2")
    node.install(behind(), redirects=[made])
    node.home += 1
    try:
        node.install(behind(), redirects=[made])
        with (
            socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client,
            pytest.raises(OSError, match="No route"),
        ):
            client.connect((DNS, 5353))  # the service's backend is loopback, too
        node.install(redirects=[made])
        assert ask("udp") == "upstream"
    finally:
        node.home -= 1
    node.install(behind(), redirects=[made])
    assert ask("udp") == "local"
