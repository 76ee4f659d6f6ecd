"""Which live sockets policies forbid: those that dialled, wherever they are, and nobody else."""

import contextlib
import errno
import socket
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import pytest

from sockhop.agent.forbidden import Looker, forbidden
from sockhop.agent.policy_table import Place, PolicyTable, compile_policies
from sockhop.datapath import accepted
from sockhop.datapath.listing import Listing
from sockhop.kernel.cgroups import cgroup_id
from sockhop.kernel.netns import current_cookie
from sockhop.model import Clients, Policy
from tests.clients.dialers import family_of
from tests.datapath.rules import allow, deny, joined, rule, text
from tests.sandbox import Sandbox

pytestmark = pytest.mark.kernel

LOOPBACK = ("127.0.9.1", "::1", "::ffff:127.0.9.1")


def table(sandbox: Sandbox, *policies: Policy) -> PolicyTable:
    groups = [sandbox.cgroup, *(path for path in sandbox.cgroup.iterdir() if path.is_dir())]
    places = {text(path): Place(cgroup_id(path), PurePosixPath(text(path))) for path in groups}
    return compile_policies(policies, current_cookie(), {}, places)


def found(sandbox: Sandbox, meant: PolicyTable) -> set[int]:
    """The cookies of the sockets that are forbidden."""
    with Listing(sandbox.pins) as listing, Looker(listing, sandbox.cgroup) as looker:
        scene = looker.look(meant, (), balanced=False)
        return looker.dialled(each.socket for each in forbidden(scene, meant))


def cookie(own: socket.socket) -> int:
    return int.from_bytes(own.getsockopt(socket.SOL_SOCKET, 57, 8), "little")  # SO_COOKIE


@contextlib.contextmanager
def connection(host: str, *, backlog: int = 1) -> Iterator[tuple[socket.socket, socket.socket]]:
    """Yield who dialled and who accepted."""
    with socket.socket(family_of(host), socket.SOCK_STREAM) as server:
        server.bind((host, 0))
        server.listen(backlog)
        with socket.create_connection(server.getsockname()[:2]) as client:
            other, _ = server.accept()
            with other:
                yield client, other


@pytest.mark.parametrize("host", LOOPBACK)
def test_who_dialled_not_who_accepted(sandbox: Sandbox, host: str) -> None:
    """Both have an address that is denied as their peer."""
    meant = table(sandbox, deny(rule("127.0.0.0/8"), rule("::1/128")))
    with connection(host) as (client, _):
        assert found(sandbox, meant) == {cookie(client)}
    with connection(host, backlog=0) as (client, _):
        assert found(sandbox, meant) == {cookie(client)}


def orphan(sandbox: Sandbox) -> bool:
    """Whether a socket whose listener is gone is still known as accepted."""
    meant = table(sandbox, deny(rule("127.0.0.0/8")))
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as server:
        server.bind(("127.0.9.1", 0))
        server.listen(5)
        client = socket.create_connection(server.getsockname())
        other, _ = server.accept()
    with client, other:
        return found(sandbox, meant) == {cookie(client)}


def test_it_is_known_after_the_listener_is_gone(sandbox: Sandbox) -> None:
    assert orphan(sandbox)


def test_a_mutant_that_goes_by_listeners_alone(
    sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accepted.Accepted, "here", lambda _: set())
    assert not orphan(sandbox)


def test_udp_that_is_connected(sandbox: Sandbox) -> None:
    meant = table(sandbox, deny(rule("127.0.9.0/24", ports=(53, 53))))
    with contextlib.ExitStack() as stack:
        clients = [
            stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) for _ in range(3)
        ]
        clients[0].connect(("127.0.9.1", 53))
        clients[1].connect(("127.0.9.1", 54))
        clients[2].sendto(b"x", ("127.0.9.1", 53))
        assert found(sandbox, meant) == {cookie(clients[0])}


def test_tcp_that_is_not_connected_yet(sandbox: Sandbox) -> None:
    sandbox.run("ip", "link", "add", "v0", "type", "veth", "peer", "name", "v1")
    sandbox.run("ip", "addr", "add", "198.51.100.1/24", "dev", "v0")
    for end in ("v0", "v1"):
        sandbox.run("ip", "link", "set", end, "up")
    meant = table(sandbox, deny(rule("198.51.100.0/24")))
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as client:
        client.setblocking(False)
        assert client.connect_ex(("198.51.100.2", 80)) == errno.EINPROGRESS
        assert found(sandbox, meant) == {cookie(client)}


def test_only_of_the_cgroups_that_are_meant(sandbox: Sandbox) -> None:
    group = sandbox.cgroup / "a"
    group.mkdir()
    outside = Path("/proc/1/cgroup").read_text().rpartition("::/")[2].strip()
    with contextlib.ExitStack() as stack:

        def client() -> socket.socket:
            made = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
            made.connect(("127.0.9.1", 53))
            return made

        here = client()
        with joined(text(group)):
            inside = client()
        with joined(f"/{outside}"):
            client()  # the hooks of the sandbox never meet it
        meant = deny(rule("127.0.9.1/32"))
        assert found(sandbox, table(sandbox, meant)) == {cookie(here), cookie(inside)}
        only = deny(rule("127.0.9.1/32"), clients=Clients(cgroups=(text(group),)))
        assert found(sandbox, table(sandbox, only)) == {cookie(inside)}
        others = allow(rule("10.0.0.0/8"), clients=Clients(exclude=(text(group),)))
        assert found(sandbox, table(sandbox, others)) == {cookie(here)}
    group.rmdir()


def test_in_every_namespace(sandbox: Sandbox) -> None:
    with Sandbox() as other, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        with joined(text(sandbox.cgroup)):
            there = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        with there:
            client.connect(("127.0.9.1", 53))
            there.connect(("127.0.9.1", 53))
            meant = table(sandbox, deny(rule("127.0.9.1/32")))
            assert found(sandbox, meant) == {cookie(there)}  # `client` was made in other's cgroup
            assert found(other, table(other, deny(rule("127.0.9.1/32")))) == {cookie(client)}


def test_no_policy_forbids_nothing(sandbox: Sandbox) -> None:
    with connection("127.0.9.1"):
        assert found(sandbox, table(sandbox)) == set()
