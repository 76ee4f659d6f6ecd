"""Node-local DNS with real name servers: a cache that asks the service that it stands for."""

import contextlib
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from sockhop.kernel.cgroups import cgroup_root
from tests.agent.test_enforce import dns_service
from tests.agent.test_policies import objects
from tests.clients.servers import own_directory, running
from tests.datapath.rules import joined, text
from tests.sandbox import Sandbox, publish, wait_until

pytestmark = pytest.mark.kernel

DNS = "10.96.0.1"
CACHE, CLUSTER = "127.0.1.2", "127.0.1.1"


def redirect(cgroup: str) -> dict[str, object]:
    ports = [{"port": 53, "protocol": protocol} for protocol in ("UDP", "TCP")]
    return {
        "apiVersion": "sockhop.io/v1alpha1",
        "kind": "LocalRedirectPolicy",
        "metadata": {"name": "node-local-dns", "namespace": "kube-system"},
        "spec": {
            "redirectFrontend": {
                "serviceMatcher": {"serviceName": "kube-dns", "toPorts": ports[:1]}
            },
            "redirectBackend": {"addresses": [CACHE], "cgroups": [cgroup], "toPorts": ports},
        },
    }


def query(name: str) -> bytes:
    """A question for the address of *name* (RFC 1035, 4.1)."""
    labels = b"".join(bytes([len(part)]) + part.encode() for part in name.split("."))
    return struct.pack("!6H", 1, 0x0100, 1, 0, 0, 0) + labels + struct.pack("!xHH", 1, 1)


def ask(client: socket.socket, name: str) -> str:
    """Ask through a connected socket; return the address that is answered, "" for none."""
    # An answer that is on its way while the socket is moved is lost: ask again, as resolvers do.
    for _ in range(4):
        client.send(query(name))
        with contextlib.suppress(TimeoutError):
            answer = client.recv(512)
            break
    else:
        pytest.fail(f"no answer to four questions for {name}")
    _, flags, _, answers, *_ = struct.unpack_from("!6H", answer)
    return socket.inet_ntoa(answer[-4:]) if flags & 0xF == 0 and answers == 1 else ""


def connected(host: str) -> socket.socket:
    client = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    client.bind(("127.0.0.1", 0))
    client.settimeout(5)
    client.connect((host, 53))
    return client


@contextlib.contextmanager
def name_server(host: str, *options: str) -> Iterator[None]:
    """dnsmasq at *host*, which knows what *options* say."""

    def answers() -> bool:
        with contextlib.suppress(OSError), connected(host) as client:
            return bool(ask(client, "who.test"))
        return False

    with own_directory() as directory:
        command = ["dnsmasq", "--keep-in-foreground", "--conf-file=/dev/null", "--user=root",
                   "--no-resolv", "--no-hosts", "--bind-interfaces", "--log-facility=-",
                   "--cache-size=0", f"--listen-address={host}", f"--pid-file={directory}/pid",
                   *options]  # fmt: skip
        with running(command, answers):
            yield


@pytest.fixture
def cache_group(sandbox: Sandbox) -> Iterator[Path]:
    group = sandbox.cgroup / "cache"
    group.mkdir()
    yield group
    wait_until(lambda: not (group / "cgroup.procs").read_text(), "an empty cgroup")
    group.rmdir()


def test_node_local_dns_both_ways(sandbox: Sandbox, cache_group: Path) -> None:
    """A client's one socket asks the cluster, the cache, the cluster; the cache never itself."""
    cgroup = f"/{cache_group.relative_to(cgroup_root())}"
    assert cgroup == text(cache_group)
    path = sandbox.manifest(objects(*dns_service()))
    with sandbox.agent(path), contextlib.ExitStack() as stack:
        stack.enter_context(name_server(CLUSTER, "--address=/test/10.1.1.1"))
        with joined(cgroup):
            # It knows one name itself, and asks the service for all others.
            stack.enter_context(
                name_server(CACHE, "--address=/who.test/127.0.1.2", f"--server={DNS}")
            )
        client = stack.enter_context(connected(DNS))
        assert ask(client, "who.test") == "10.1.1.1"
        publish(path, objects(*dns_service(), redirect(cgroup)))
        wait_until(lambda: ask(client, "who.test") == "127.0.1.2", "the cache")
        # No loop: what the cache does not know it finds at the cluster's server.
        assert all(ask(client, f"name{i}.test") == "10.1.1.1" for i in range(100))
        with connected(DNS) as fresh:
            assert ask(fresh, "who.test") == "127.0.1.2"
        publish(path, objects(*dns_service()))
        wait_until(lambda: ask(client, "who.test") == "10.1.1.1", "the cluster again")
        assert client.getpeername() == (DNS, 53)


def test_without_the_caches_cgroup_nobody_is_redirected(sandbox: Sandbox) -> None:
    """Whoever begins to run there must be exempt at once."""
    group = sandbox.cgroup / "later"
    cgroup = f"/{group.relative_to(cgroup_root())}"
    path = sandbox.manifest(objects(*dns_service(), redirect(cgroup)))
    with (
        sandbox.agent(path),
        name_server(CLUSTER, "--address=/test/10.1.1.1"),
        name_server(CACHE, "--address=/who.test/127.0.1.2"),
        connected(DNS) as client,
    ):
        assert ask(client, "who.test") == "10.1.1.1"
        assert "no        all,!" in sandbox.sockhop("get", "policies").stdout
        group.mkdir()
        wait_until(lambda: ask(client, "who.test") == "127.0.1.2", "the cache")
        assert "yes       all,!" in sandbox.sockhop("get", "policies").stdout
        group.rmdir()
        wait_until(lambda: ask(client, "who.test") == "10.1.1.1", "the cluster again")
