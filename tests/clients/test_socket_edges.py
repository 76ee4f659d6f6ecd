"""What programs do with sockets beyond a plain connect: again, in vain, in rarer ways."""

import ctypes
import errno
import os
import socket
import struct
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator

import pytest

from tests.clients import bpftool
from tests.clients.dialers import family_of
from tests.clients.servers import Pair, echoes
from tests.sandbox import Sandbox, ServerThread, compact, wait_until

pytestmark = pytest.mark.kernel

TCP, UDP = socket.SOCK_STREAM, socket.SOCK_DGRAM
PORT = 80
SERVED, OTHER, CLOSED, NOBODY, RESTING, WEIGHTLESS, CROSSING, LOST = range(10, 18)
FORMS = {"IPv4": "10.96.0.{}", "IPv6": "fd00:96::{}", "mapped": "::ffff:10.96.0.{}"}
PAIR_PORT, OTHER_PORT, CLOSED_PORT = 7000, 7010, 9

forms = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
kinds = pytest.mark.parametrize("kind", [TCP, UDP], ids=["tcp", "udp"])


def service(number: int, *backends: object) -> dict[str, object]:
    """A service at the numbered address of both families."""
    addresses = (f"10.96.0.{number}", f"[fd00:96::{number}]")
    return {
        "frontends": [f"{address}:{PORT}/tcp+udp" for address in addresses],
        "backends": list(backends),
    }


def on_loopback(port: int, **fields: object) -> list[object]:
    """Backends on both loopback addresses."""
    addresses = (f"127.0.0.1:{port}", f"[::1]:{port}")
    return [{"address": address, **fields} for address in addresses]


def manifest(pair: Pair) -> str:
    """Every kind of service that the tests dial."""
    return compact(
        served=service(SERVED, *pair.backends("one", "two")),
        other=service(OTHER, *on_loopback(OTHER_PORT)),
        closed=service(CLOSED, *on_loopback(CLOSED_PORT)),
        nobody=service(NOBODY),
        lost=service(LOST, "10.77.0.1:80", "[fd00:77::1]:80"),
        resting=service(RESTING, *on_loopback(PAIR_PORT, state="maintenance")),
        weightless=service(WEIGHTLESS, *on_loopback(PAIR_PORT, weight=0)),
        crossing={
            "frontends": [f"[fd00:96::{CROSSING}]:{PORT}/tcp+udp"],
            "backends": pair.backends("one", "two")[::2],
        },
    )


@pytest.fixture(scope="module")
def node() -> Iterator[Sandbox]:
    with (
        Sandbox() as made,
        echoes(PAIR_PORT, udp=False) as pair,
        echoes(PAIR_PORT, udp=True),
        ServerThread("three", "127.0.0.1", OTHER_PORT),
        ServerThread("three", "127.0.0.1", OTHER_PORT, udp=True),
        ServerThread("three", "::1", OTHER_PORT),
        ServerThread("three", "::1", OTHER_PORT, udp=True),
        made.agent(made.manifest(manifest(pair)), "--settle-every", "1"),
    ):
        yield made


@pytest.fixture(autouse=True)
def _live_returns_to_zero(node: Sandbox) -> Iterator[None]:
    yield
    wait_until(lambda: not bpftool.live_counts(node.pins), "no live socket", 2)


def ask(client: socket.socket) -> str:
    """Ask a connected socket's peer for its name; over TCP it speaks first."""
    client.settimeout(2)
    if client.type is UDP:
        client.send(b"who?")
    return client.recv(100).decode()


def live_by_port(node: Sandbox) -> Counter[int]:
    """Live sockets by the port of their backend, from bpftool."""
    ports = {number: value["port"] for number, value in bpftool.map_entries(node.pins, "backends")}
    found: Counter[int] = Counter()
    for (_, _, backend), count in bpftool.live_counts(node.pins).items():
        found[ports[backend]] += count
    return found


# --- no backend ------------------------------------------------------------------------------


@kinds
@forms
@pytest.mark.parametrize("number", [NOBODY, RESTING, WEIGHTLESS])
@pytest.mark.parametrize("blocking", [True, False], ids=["blocking", "nonblocking"])
def test_no_backend_is_said_at_once(
    node: Sandbox, form: str, kind: socket.SocketKind, number: int, blocking: bool
) -> None:
    dialled, took = form.format(number), []
    for _ in range(3):
        with socket.socket(family_of(dialled), kind) as client:
            client.setblocking(blocking)
            begin = time.monotonic()
            assert client.connect_ex((dialled, PORT)) == errno.EHOSTUNREACH
            took.append(time.monotonic() - begin)
    # The fastest: others use this machine too.
    assert min(took) < 0.1


# --- live counts -----------------------------------------------------------------------------


@kinds
@forms
def test_live_counts_are_exact_while_sockets_come_and_go(
    node: Sandbox, form: str, kind: socket.SocketKind
) -> None:
    dialled, clients = form.format(SERVED), []
    for _ in range(20):
        client = socket.socket(family_of(dialled), kind)
        client.connect((dialled, PORT))
        clients.append(client)
    names = [ask(client) for client in clients]
    ports = {"one": PAIR_PORT, "two": PAIR_PORT + 1}
    assert live_by_port(node) == Counter(ports[name] for name in names)
    for client in clients[:15]:
        client.close()
    assert live_by_port(node) == Counter(ports[name] for name in names[15:])
    for client in clients[15:]:
        client.close()
    assert not live_by_port(node)


def test_a_duplicate_descriptor_is_no_second_socket(node: Sandbox) -> None:
    client = socket.create_connection((FORMS["IPv4"].format(OTHER), PORT), timeout=2)
    with client.dup():
        assert live_by_port(node) == {OTHER_PORT: 1}
        client.close()
        assert live_by_port(node) == {OTHER_PORT: 1}
    assert not live_by_port(node)


def test_a_killed_process_leaves_no_live_sockets(node: Sandbox) -> None:
    program = f"""
import socket, sys
held = [socket.create_connection(("10.96.0.{OTHER}", {PORT})) for _ in range(5)]
print("ready", flush=True)
sys.stdin.read()
"""
    command = [sys.executable, "-Ec", program]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout
        assert process.stdout.readline() == b"ready\n"
        assert live_by_port(node) == {OTHER_PORT: 5}
        process.kill()
    wait_until(lambda: not live_by_port(node), "no live socket", 2)


# --- connect() again -------------------------------------------------------------------------


@forms
def test_one_udp_socket_connects_to_many(node: Sandbox, form: str) -> None:
    served, other = form.format(SERVED), form.format(OTHER)
    outside = {"10": "127.0.0.1", "fd": "::1", "::": "::ffff:127.0.0.1"}[form[:2]]
    with (
        ServerThread("outside", outside.removeprefix("::ffff:"), udp=True) as server,
        socket.socket(family_of(served), UDP) as client,
    ):
        for host, port, names in (
            (served, PORT, {"one", "two"}),
            (other, PORT, {"three"}),
            (outside, server.port, {"outside"}),
            (served, PORT, {"one", "two"}),
            (served, PORT, {"one", "two"}),
            # The backend itself, dialled by its own address, is no frontend.
            (outside, OTHER_PORT, {"three"}),
            (other, PORT, {"three"}),
        ):
            client.connect((host, port))
            assert client.getpeername()[:2] == (host, port)
            assert ask(client) in names
            # Never too low; that the socket has left, the agent finds out later.
            assert live_by_port(node).total() >= (port == PORT)
        assert live_by_port(node)[OTHER_PORT]
        wait_until(lambda: live_by_port(node) == {OTHER_PORT: 1}, "only the last to count", 5)


@forms
def test_a_udp_socket_whose_next_connect_is_rejected_stays_where_it_was(
    node: Sandbox, form: str
) -> None:
    served = form.format(SERVED)
    with socket.socket(family_of(served), UDP) as client:
        client.connect((served, PORT))
        assert client.connect_ex((form.format(NOBODY), PORT)) == errno.EHOSTUNREACH
        # The kernel has not touched the socket: it goes on talking to its backend ...
        assert ask(client) in {"one", "two"}
        # ... so that it still has a provenance, and counts.
        assert client.getpeername()[:2] == (served, PORT)
        assert live_by_port(node).total() == 1


@forms
def test_a_udp_socket_whose_next_backend_has_no_route_does_not_claim_to_be_there(
    node: Sandbox, form: str
) -> None:
    served, lost = form.format(SERVED), form.format(LOST)
    with socket.socket(family_of(served), UDP) as client:
        client.connect((served, PORT))
        assert client.connect_ex((lost, PORT)) == errno.ENETUNREACH
        assert ask(client) in {"one", "two"}
        # The hook saw a good connect; only the kernel knows that it came to nothing.
        assert client.getpeername()[:2] != (lost, PORT)


@forms
def test_a_udp_socket_that_is_dissolved_has_no_peer(node: Sandbox, form: str) -> None:
    served = form.format(SERVED)
    with socket.socket(family_of(served), UDP) as client:
        client.connect((served, PORT))
        _connect_raw(client, struct.pack("=H26x", socket.AF_UNSPEC))
        with pytest.raises(OSError, match="not connected"):
            client.getpeername()
        client.connect((form.format(OTHER), PORT))
        assert client.getpeername()[:2] == (form.format(OTHER), PORT)
        assert live_by_port(node)[OTHER_PORT]
        wait_until(lambda: live_by_port(node) == {OTHER_PORT: 1}, "only the last to count", 5)


def test_an_ipv6_udp_socket_may_be_given_an_ipv4_address(node: Sandbox) -> None:
    address = socket.inet_aton(f"10.96.0.{SERVED}")
    with socket.socket(socket.AF_INET6, UDP) as client:
        _connect_raw(
            client, struct.pack("=H", socket.AF_INET) + struct.pack("!H4s8x", PORT, address)
        )
        assert client.getpeername()[:2] == (f"::ffff:10.96.0.{SERVED}", PORT)
        assert ask(client) in {"one", "two"}


@forms
def test_a_tcp_socket_that_was_refused_connects_again(node: Sandbox, form: str) -> None:
    with socket.socket(family_of(form.format(SERVED)), TCP) as client:
        for _ in range(2):
            assert client.connect_ex((form.format(CLOSED), PORT)) == errno.ECONNREFUSED
            with pytest.raises(OSError, match="not connected"):
                client.getpeername()
        assert client.connect_ex((form.format(NOBODY), PORT)) == errno.EHOSTUNREACH
        client.connect((form.format(OTHER), PORT))
        assert client.getpeername()[:2] == (form.format(OTHER), PORT)
        assert ask(client) == "three"
        assert live_by_port(node) == {OTHER_PORT: 1}


@forms
def test_a_connected_tcp_socket_stays_where_it_is(node: Sandbox, form: str) -> None:
    served = form.format(SERVED)
    with socket.socket(family_of(served), TCP) as client:
        client.connect((served, PORT))
        assert client.connect_ex((form.format(OTHER), PORT)) == errno.EISCONN
        assert client.getpeername()[:2] == (served, PORT)
        assert ask(client) in {"one", "two"}
        assert live_by_port(node).total() == 1


# --- rarer ways to connect -------------------------------------------------------------------


@kinds
def test_an_ipv6_frontend_may_have_ipv4_backends(node: Sandbox, kind: socket.SocketKind) -> None:
    dialled = f"fd00:96::{CROSSING}"
    with socket.socket(socket.AF_INET6, kind) as client:
        client.connect((dialled, PORT))
        assert client.getpeername()[:2] == (dialled, PORT)
        assert client.getsockname()[0] == "::ffff:127.0.0.1"
        assert ask(client) in {"one", "two"}


@kinds
def test_but_not_for_sockets_that_want_ipv6_only(node: Sandbox, kind: socket.SocketKind) -> None:
    with socket.socket(socket.AF_INET6, kind) as client:
        client.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        assert client.connect_ex((f"fd00:96::{CROSSING}", PORT)) == errno.ENETUNREACH


@forms
def test_tcp_fast_open_connects_too(node: Sandbox, form: str) -> None:
    dialled = form.format(CLOSED)
    backend = "::1" if form == FORMS["IPv6"] else "127.0.0.1"
    with (
        socket.create_server((backend, CLOSED_PORT), family=family_of(backend)) as listener,
        socket.socket(family_of(dialled), TCP) as client,
    ):
        client.sendto(b"who?", socket.MSG_FASTOPEN, (dialled, PORT))
        assert client.getpeername()[:2] == (dialled, PORT)
        listener.settimeout(2)
        with listener.accept()[0] as accepted:
            assert accepted.recv(100) == b"who?"


def _connect_raw(client: socket.socket, address: bytes) -> None:
    """connect(2) with any bytes as address: Python offers neither AF_UNSPEC nor mixed families."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.connect(client.fileno(), address, len(address)):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
