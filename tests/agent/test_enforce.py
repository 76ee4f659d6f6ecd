"""What an agent does with live sockets when a policy or a redirect comes or goes."""

import contextlib
import errno
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sockhop.kernel.cgroups import cgroup_root
from sockhop.kernel.netns import entered
from tests.agent.test_forbidden import connection, cookie
from tests.agent.test_policies import deny, manifest, objects
from tests.datapath.rules import joined, text, verdict
from tests.sandbox import Sandbox, ServerThread, publish, wait_until

pytestmark = pytest.mark.kernel

DNS = "10.96.0.1"


def of_sockets(sandbox: Sandbox, number: int) -> list[dict[str, Any]]:
    """The events of sockets, once there are so many: they are written after the deed."""
    found = [each for each in events(sandbox) if each.get("cookie")]
    return found if len(found) >= number else []


def error_of(client: socket.socket) -> int:
    """The error that a socket has, taken from it."""
    return client.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)


def connected_udp(host: str, port: int = 53) -> socket.socket:
    client = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    client.settimeout(5)
    client.connect((host, port))
    return client


def events(sandbox: Sandbox) -> list[dict[str, Any]]:
    path = sandbox.api.with_suffix(".events")
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_live_sockets_end_when_a_policy_forbids_them(sandbox: Sandbox) -> None:
    """Within a second of the apply, here and in another namespace; others live."""
    path = sandbox.manifest(manifest())
    with (
        sandbox.agent(path),
        connection("127.0.9.1") as (here, accepted),
        connection("127.0.8.1") as (allowed, _),
        Sandbox() as other,
        connection("127.0.9.1") as (elsewhere, _),  # made in other's cgroup, which nobody polices
        joined(text(sandbox.cgroup)),
        connected_udp("127.0.9.1") as there,
    ):
        assert other.netns.stat().st_ino == Path("/proc/thread-self/ns/net").stat().st_ino
        numbers = cookie(here), cookie(there)
        publish(path, manifest(deny("127.0.9.0/24")))
        assert wait_until(lambda: error_of(here), "an ended socket") == errno.ECONNABORTED
        assert wait_until(lambda: error_of(there), "an ended socket") == errno.ECONNABORTED
        assert verdict("127.0.9.1")
        told = wait_until(lambda: of_sockets(sandbox, 2), "events of both")
        ended = {each["cookie"]: each for each in told if each["kind"] == "severed"}
        assert set(ended) == set(numbers)
        for client in (elsewhere, allowed):
            client.send(b"still here")
            assert error_of(client) == 0
        with pytest.raises(ConnectionResetError):
            accepted.recv(10)
        assert ended[numbers[0]]["reason"] == "policy no denies it"
        shown = sandbox.sockhop("explain", str(numbers[0]), check=False).stdout
        assert "policy no denies it" in shown


ROUNDS = 5


def test_that_takes_less_than_a_second(sandbox: Sandbox) -> None:
    """From the new manifest to the end of the last socket, here and in another namespace."""
    path = sandbox.manifest(manifest())
    took = []
    with sandbox.agent(path), Sandbox() as other, contextlib.ExitStack() as servers:
        for place in (sandbox, other):
            with entered(place.netns):
                servers.enter_context(ServerThread("s", "127.0.9.1", udp=True))
        for _ in range(ROUNDS):
            with contextlib.ExitStack() as stack, joined(text(sandbox.cgroup)):
                clients = []
                for place in (sandbox, other):
                    with entered(place.netns):
                        clients.append(stack.enter_context(connected_udp("127.0.9.1")))
                began = time.monotonic()
                publish(path, manifest(deny("127.0.9.0/24")))
                for client in clients:
                    wait_until(lambda c=client: error_of(c), "an ended socket")  # type: ignore[misc]
                took.append(time.monotonic() - began)
                publish(path, manifest())
                wait_until(lambda: not verdict("127.0.9.1"), "no policy")
    print("milliseconds:", *(round(seconds * 1e3) for seconds in took))
    assert max(took) < 1, took


def test_in_a_namespace_that_only_a_descriptor_holds(sandbox: Sandbox) -> None:
    """The first look passes over it, the next one does not."""
    path = sandbox.manifest(manifest())
    with sandbox.agent(path), contextlib.ExitStack() as stack:
        with Sandbox() as other:
            held = os.open(other.netns, os.O_RDONLY)
            stack.callback(os.close, held)
            with joined(text(sandbox.cgroup)):
                client = stack.enter_context(connected_udp("127.0.9.1"))
        began = time.monotonic()
        publish(path, manifest(deny("127.0.9.0/24")))
        assert wait_until(lambda: error_of(client), "an ended socket") == errno.ECONNABORTED
        print("milliseconds:", round((time.monotonic() - began) * 1e3))


def test_who_was_denied_when_the_agent_was_away(sandbox: Sandbox) -> None:
    with (
        connection("127.0.9.1") as (client, _),
        sandbox.agent(sandbox.manifest(manifest(deny("127.0.9.0/24")))),
    ):
        assert wait_until(lambda: error_of(client), "an ended socket") == errno.ECONNABORTED


def test_a_service_may_want_its_sockets_left(sandbox: Sandbox) -> None:
    with ServerThread("s", "127.0.9.1", udp=True) as server:
        leaves = {
            "name": "leaves",
            "frontends": ["10.0.0.1:53/udp"],
            "backends": [server.endpoint],
            "intent": {"udp": {"denied": "leave"}},
        }
        path = sandbox.manifest(manifest(services=[leaves]))
        with (
            sandbox.agent(path),
            connected_udp("10.0.0.1") as left,
            connected_udp("127.0.9.1") as ended,
        ):
            publish(path, manifest(deny("127.0.9.0/24"), services=[leaves]))
            assert wait_until(lambda: error_of(ended), "an ended socket") == errno.ECONNABORTED
            left.send(b"?")
            assert left.recv(10) == b"s"


def test_many_wait_for_approval(sandbox: Sandbox) -> None:
    path = sandbox.manifest(manifest())
    with (
        sandbox.agent(path, "--approve-above", "1") as agent,
        connected_udp("127.0.9.1") as one,
        connected_udp("127.0.9.1") as two,
    ):
        publish(path, manifest(deny("127.0.9.0/24")))
        held = wait_until(lambda: agent.status()["termination"]["held"], "a held change")
        assert held[0]["reason"] == "it may end 2 sockets, more than 1"
        assert held[0]["what"] == ["policy no denies"]
        assert verdict("127.0.9.1")
        assert error_of(one) == error_of(two) == 0
        sandbox.sockhop("approve")
        for client in (one, two):
            assert wait_until(lambda c=client: error_of(c), "an end") == errno.ECONNABORTED  # type: ignore[misc]
        assert not agent.status()["termination"]["held"]


# --- redirects -----------------------------------------------------------------------------------


@pytest.fixture
def servers() -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for name, host in (("upstream", DNS), ("behind", "127.0.1.1"), ("local", "127.0.1.2")):
            stack.enter_context(ServerThread(name, host, 53, udp=True))
        yield


def redirect(cgroup: str) -> dict[str, Any]:
    ports = [{"port": 53, "protocol": "UDP"}]
    return {
        "apiVersion": "sockhop.io/v1alpha1",
        "kind": "LocalRedirectPolicy",
        "metadata": {"name": "dns", "namespace": "kube-system"},
        "spec": {
            "redirectFrontend": {"addressMatcher": {"ip": DNS, "toPorts": ports}},
            "redirectBackend": {"addresses": ["127.0.1.2"], "cgroups": [cgroup], "toPorts": ports},
        },
    }


def dns_service() -> list[dict[str, Any]]:
    ports = [{"name": "dns", "port": 53, "protocol": "UDP"}]
    return [
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": "kube-dns", "namespace": "kube-system"},
            "spec": {"clusterIP": DNS, "ports": ports},
        },
        {
            "apiVersion": "discovery.k8s.io/v1",
            "kind": "EndpointSlice",
            "metadata": {
                "name": "kube-dns-1",
                "namespace": "kube-system",
                "labels": {"kubernetes.io/service-name": "kube-dns"},
            },
            "addressType": "IPv4",
            "endpoints": [{"addresses": ["127.0.1.1"]}],
            "ports": ports,
        },
    ]


def ask(client: socket.socket) -> str:
    """An answer that is on its way while the socket is moved is lost: ask again, as programs do."""
    for _ in range(4):
        client.send(b"?")
        with contextlib.suppress(TimeoutError):
            return client.recv(20).decode()
    pytest.fail("no answer to four questions")


@pytest.mark.parametrize("with_service", [True, False], ids=["service", "address"])
def test_live_sockets_follow_a_redirect_both_ways(
    sandbox: Sandbox, servers: None, with_service: bool
) -> None:
    """The same socket: its program notices nothing. The local backend's own stays."""
    services = dns_service() if with_service else []
    before = "behind" if with_service else "upstream"
    group = sandbox.cgroup / "cache"
    group.mkdir()
    cgroup = f"/{group.relative_to(cgroup_root())}"
    # A source address that fits both, as a pod has.
    path = sandbox.manifest(objects(*services, *other_objects()))
    with sandbox.agent(path), joined(cgroup):
        own = bound_udp()
        with joined(text(sandbox.cgroup)):
            client = bound_udp()
        with own, client:
            assert ask(client) == before
            assert ask(own) == before
            publish(path, objects(*services, redirect(cgroup), *other_objects()))
            wait_until(lambda: ask(client) == "local", "a redirected socket")
            assert client.getpeername() == (DNS, 53)
            assert ask(own) == before
            publish(path, objects(*services, *other_objects()))
            wait_until(lambda: ask(client) == before, "a socket that is back")
            assert ask(own) == before
            moves = wait_until(lambda: of_sockets(sandbox, 2), "an event of each move")
            assert {each["kind"] for each in moves} == {"resteered"}
    group.rmdir()


def other_objects() -> list[dict[str, Any]]:
    """A list may not be empty."""
    return [{"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}}]


def bound_udp() -> socket.socket:
    client = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    client.bind(("127.0.0.1", 0))
    client.settimeout(5)
    client.connect((DNS, 53))
    return client
