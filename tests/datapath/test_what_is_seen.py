"""What a program and its peer see of a socket that is severed, as docs/severing.md tells it."""

import errno
import select
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from sockhop.datapath.ending import Action, Engine, EngineName, choose_engine
from sockhop.datapath.listing import Listing
from sockhop.kernel.netns import entered
from tests.datapath.kinds import cookie, namespace, unique
from tests.datapath.node import Node, service

pytestmark = pytest.mark.kernel

BACKEND, FRONTEND = ("10.96.1.5", 7000), ("10.9.0.1", 80)


@pytest.fixture(params=["iterator", "netlink"])
def engine(node: Node, request: pytest.FixtureRequest) -> Iterator[Engine]:
    node.install(service("seen", "10.9.0.1:80/tcp", "10.9.0.1:80/udp", backends=["10.96.1.5:7000"]))
    with choose_engine(node.sandbox.pins, EngineName(request.param)) as chosen:
        yield chosen


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as made:
        yield made


def sever(node: Node, engine: Engine, own: socket.socket) -> None:
    with Listing(node.sandbox.pins) as listing:
        (outcome,) = engine.sever_sockets(s for s in listing.here() if s.cookie == cookie(own))
    assert outcome.action is Action.SEVERED


def tcp_pair(stack: ExitStack) -> tuple[socket.socket, socket.socket]:
    server = stack.enter_context(socket.create_server(BACKEND))
    client = stack.enter_context(socket.create_connection(FRONTEND, timeout=5))
    accepted = stack.enter_context(server.accept()[0])
    accepted.settimeout(5)
    return client, accepted


def error_of(call: object, *arguments: object) -> str:
    with pytest.raises(OSError) as raised:  # noqa: PT011
        call(*arguments)  # type: ignore[operator]
    return errno.errorcode[raised.value.errno or 0]


def test_tcp_a_reset_for_the_peer(node: Node, engine: Engine, stack: ExitStack) -> None:
    client, accepted = tcp_pair(stack)
    sever(node, engine, client)
    assert error_of(accepted.recv, 1) == "ECONNRESET"
    assert error_of(client.send, b"?") == "ECONNABORTED"
    assert error_of(client.send, b"?") == "EPIPE"


def test_tcp_that_is_half_closed(node: Node, engine: Engine, stack: ExitStack) -> None:
    client, accepted = tcp_pair(stack)
    client.shutdown(socket.SHUT_WR)
    assert accepted.recv(1) == b""
    sever(node, engine, client)
    assert error_of(accepted.send, b"?") in {"ECONNRESET", "EPIPE"}
    assert error_of(client.recv, 1) == "ECONNABORTED"


def test_tcp_that_waits_for_an_answer(node: Node, engine: Engine, stack: ExitStack) -> None:
    client, _ = tcp_pair(stack)
    client.settimeout(None)
    seen: list[str] = []
    waiting = threading.Thread(target=lambda: seen.append(error_of(client.recv, 1)))
    waiting.start()
    poll = select.poll()
    poll.register(client, select.POLLIN)
    sever(node, engine, client)
    waiting.join(5)
    assert seen == ["ECONNABORTED"]
    assert poll.poll(0)[0][1] & (select.POLLERR | select.POLLHUP)


def test_tcp_that_is_connecting_nobody_hears_of(
    node: Node, engine: Engine, stack: ExitStack
) -> None:
    silent = stack.enter_context(socket.socket())
    silent.bind(BACKEND)
    silent.listen(0)
    stack.enter_context(socket.create_connection(BACKEND))  # fills the queue
    client = stack.enter_context(socket.socket())
    client.setblocking(False)
    assert client.connect_ex(FRONTEND) == errno.EINPROGRESS
    sever(node, engine, client)
    assert client.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == errno.ECONNABORTED


def test_udp_silence_for_the_peer(node: Node, engine: Engine, stack: ExitStack) -> None:
    server = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
    server.bind(BACKEND)
    server.settimeout(0.2)
    client = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
    client.settimeout(5)
    client.connect(FRONTEND)
    client.send(b"?")
    assert server.recv(10) == b"?"
    sever(node, engine, client)
    with pytest.raises(TimeoutError):
        server.recv(10)
    assert error_of(client.recv, 10) == "ECONNABORTED"
    # It is no longer connected; the program that connects it again goes on with it.
    assert error_of(client.send, b"?") == "EDESTADDRREQ"
    client.connect(FRONTEND)
    client.send(b"!")
    assert server.recv(10) == b"!"


def test_udp_that_waits_for_an_answer(node: Node, engine: Engine, stack: ExitStack) -> None:
    client = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
    client.connect(FRONTEND)
    seen: list[str] = []
    waiting = threading.Thread(target=lambda: seen.append(error_of(client.recv, 10)))
    waiting.start()
    sever(node, engine, client)
    waiting.join(5)
    assert seen == ["ECONNABORTED"]


def test_a_route_that_makes_the_backend_unreachable_is_not_noticed(stack: ExitStack) -> None:
    near, far = unique("near"), unique("far")
    stack.enter_context(namespace(near))
    stack.enter_context(namespace(far))

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True)

    ip("-n", near, "link", "add", "v0", "type", "veth", "peer", "name", "v1", "netns", far)
    for name, device, address in ((near, "v0", "10.50.0.1/24"), (far, "v1", "10.50.0.2/24")):
        ip("-n", name, "addr", "add", address, "dev", device)
        ip("-n", name, "link", "set", device, "up")
    with entered(Path("/run/netns", far)):
        server = stack.enter_context(socket.create_server(("10.50.0.2", 7000)))
    with entered(Path("/run/netns", near)):
        tcp = stack.enter_context(socket.create_connection(server.getsockname(), timeout=5))
        udp = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        udp.connect(server.getsockname())
    ip("-n", near, "route", "add", "unreachable", "10.50.0.2/32")
    assert tcp.send(b"?") == 1
    tcp.settimeout(0.5)
    udp.settimeout(0.2)
    for waiting in (tcp, udp):
        with pytest.raises(TimeoutError):
            waiting.recv(1)
    assert error_of(udp.send, b"?") == "EHOSTUNREACH"
