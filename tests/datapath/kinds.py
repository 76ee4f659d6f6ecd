"""Sockets of every kind that may or may not be ended, all at or near one backend."""

import contextlib
import errno
import os
import socket
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

from sockhop.datapath.sockets import TCP_STATES
from sockhop.kernel.netns import entered
from sockhop.kernel.sockdiag import list_sockets
from sockhop.model import Service
from tests.clients.dialers import family_of
from tests.datapath.node import ADDRESSES, service
from tests.datapath.udp import connect_raw
from tests.sandbox import wait_until

__all__ = [
    "ANSWERING",
    "SERVICES",
    "SILENT",
    "Kinds",
    "cookie",
    "fate",
    "namespace",
    "time_waits",
    "unique",
]

TCP, UDP = socket.SOCK_STREAM, socket.SOCK_DGRAM
X4, X6, SILENT4 = ("10.96.1.5", 7000), ("fd00:96::1", 7000), ("10.96.1.6", 7000)
DEFERRING = ("10.96.1.7", 7000)
A4, A6, A_MAPPED, B4, SLOW = "10.9.0.1", "fd00:9::1", "::ffff:10.9.0.1", "10.9.0.2", "10.9.0.3"
DISCONNECT = struct.pack("=H14x", socket.AF_UNSPEC)
ELSEWHERE = ("10.96.1.99", 9)
ANSWERING = ("10.96.1.5:7000", "[fd00:96::1]:7000")
SILENT = ("10.96.1.6:7000",)
SERVICES: tuple[Service, ...] = (
    service("a", "10.9.0.1:80/tcp", "10.9.0.1:80/udp", "[fd00:9::1]:80/tcp", "[fd00:9::1]:80/udp",
            backends=ANSWERING),
    service("b", "10.9.0.2:80/tcp", "10.9.0.2:80/udp", backends=ANSWERING),
    service("slow", "10.9.0.3:80/tcp", backends=SILENT),
)  # fmt: skip
"""a and b have the same backend; nobody accepts at that of slow."""


@contextlib.contextmanager
def namespace(name: str) -> Iterator[Path]:
    """Make a network namespace with the addresses of a node."""
    subprocess.run(["ip", "netns", "add", name], check=True)
    try:
        ip = ["ip", "-n", name]
        subprocess.run([*ip, "link", "set", "lo", "up"], check=True)
        for address in ADDRESSES:
            subprocess.run([*ip, "addr", "add", address, "dev", "lo"], check=True)
        path = Path("/run/netns") / name
        with entered(path):
            wait_until(_reaches_itself, "a way to its own IPv6 address")  # made by a work queue
        yield path
    finally:
        subprocess.run(["ip", "netns", "del", name], check=False)


def _reaches_itself() -> bool:
    with socket.socket(socket.AF_INET6, UDP) as own, contextlib.suppress(OSError):
        own.bind((X6[0], 0))
        own.connect((X6[0], 9))
        return True
    return False


def fate(own: socket.socket) -> str:
    """Return the error that waits for the program, "" for none."""
    number = own.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    return errno.errorcode[number] if number else ""


def cookie(own: socket.socket) -> int:
    """Return SO_COOKIE."""
    return int.from_bytes(own.getsockopt(socket.SOL_SOCKET, 57, 8), "little")


class Kinds:
    """Sockets in this thread's network namespace; SERVICES are installed.

    `with_a` are at service a's backend and may be ended; `spared` are all others, by what they are.
    """

    def __init__(self) -> None:
        self._stack = contextlib.ExitStack()
        self.spared: dict[str, socket.socket] = {}
        self.with_a: dict[str, socket.socket] = {}
        home = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
        self._stack.callback(os.close, home)
        self._home = Path(f"/proc/self/fd/{home}")
        self._half_open: socket.socket
        try:
            self._serve()
            self._connect_to_a()
            self._make_spared()
        except BaseException:
            self._stack.close()
            raise

    def __enter__(self) -> "Kinds":
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def check(self, *, ended: bool, where: str = "") -> None:
        """Whether those with a are ended, or not, and all others live as they did."""
        for name, own in self.with_a.items():
            assert fate(own) == ("ECONNABORTED" if ended else ""), f"{name} {where}"
        for name, own in self.spared.items():
            assert not fate(own), f"{name} {where}"
            assert own.getsockname() == self._names[name], f"{name} {where}"
            if name.startswith("udp"):
                with contextlib.suppress(OSError):
                    assert own.getpeername() == self._peers.get(name), f"{name} {where}"
        with entered(self._home):
            self._check_minisockets(where)

    def _check_minisockets(self, where: str) -> None:
        assert self.time_wait in time_waits(), f"TIME-WAIT {where}"
        self._half_open.send(b"?")
        self._stack.enter_context(self._deferring.accept()[0])
        self._half_open.close()
        self._half_open = self._dial(DEFERRING[0], TCP, DEFERRING[1])

    def _new(self, host: str, kind: int) -> socket.socket:
        own = self._stack.enter_context(socket.socket(family_of(host), kind))
        own.settimeout(5)
        return own

    def _dial(self, host: str, kind: int, port: int = 80) -> socket.socket:
        own = self._new(host, kind)
        own.connect((host, port))
        return own

    def _serve(self) -> None:
        for name, (host, port) in (("tcp4 listens", X4), ("tcp6 listens", X6)):
            server = self._new(host, TCP)
            server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            server.bind((host, port))
            server.listen(100)
            self.spared[name] = server
        # SYNs are dropped while this queue is full.
        silent = self._new(SILENT4[0], TCP)
        silent.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        silent.bind(SILENT4)
        silent.listen(0)
        self.spared["tcp4 listens, full"] = silent
        # A bare acknowledgement leaves a connection in NEW_SYN_RECV here, until data comes.
        self._deferring = self._new(DEFERRING[0], TCP)
        self._deferring.setsockopt(socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT, 60)
        self._deferring.bind(DEFERRING)
        self._deferring.listen()
        self._half_open = self._dial(DEFERRING[0], TCP, DEFERRING[1])
        self.spared["tcp4 in the queue"] = self._dial(*(SILENT4[0], TCP, SILENT4[1]))

    def _connect_to_a(self) -> None:
        for form, host in (("4", A4), ("6", A6), (" mapped", A_MAPPED)):
            self.with_a[f"tcp{form}"] = self._dial(host, TCP)
            self.with_a[f"udp{form}"] = self._dial(host, UDP)
        bound = self._new(A4, UDP)
        bound.bind((X4[0], 0))
        bound.connect((A4, 80))
        self.with_a["udp4 bound"] = bound
        device = self._new(A4, TCP)
        device.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"lo")
        device.connect((A4, 80))
        self.with_a["tcp4 of a device"] = device
        half = self._dial(A4, TCP)
        half.shutdown(socket.SHUT_WR)
        self.with_a["tcp4 half closed"] = half

    def _make_spared(self) -> None:
        spared = self.spared
        spared["tcp4 with b"], spared["udp4 with b"] = self._dial(B4, TCP), self._dial(B4, UDP)
        spared["tcp4 accepted"] = self._accepted(spared["tcp4 with b"])
        spared["tcp4 unmanaged"] = self._dial(X4[0], TCP, X4[1])
        spared["udp4 unmanaged"] = self._dial(X4[0], UDP, X4[1])
        spared["udp4 unconnected"] = self._new(A4, UDP)
        spared["udp4 unconnected"].sendto(b"?", (A4, 80))
        for name, bind in (("udp4 disconnected", False), ("udp4 bound, disconnected", True)):
            own = self._new(A4, UDP)
            if bind:
                own.bind((X4[0], 7777))
            own.connect((A4, 80))
            connect_raw(own, DISCONNECT)
            spared[name] = own
        for name, host, kind, there in (
            ("udp4 gone elsewhere", A4, UDP, ELSEWHERE),
            ("udp4 gone to b", A4, UDP, (B4, 80)),
            ("udp6 gone elsewhere", A6, UDP, ("fd00:96::1", 9)),
            ("udp mapped, gone elsewhere", A_MAPPED, UDP, ("::ffff:10.96.1.99", 9)),
            ("tcp4 gone elsewhere", A4, TCP, SILENT4),
        ):
            own = self._dial(host, kind)
            if kind == TCP:
                connect_raw(own, DISCONNECT)
                own.setblocking(False)
                with contextlib.suppress(BlockingIOError):
                    own.connect(there)
            else:
                own.connect(there)
            spared[name] = own
        self._leave_a_time_wait()
        self._names = {name: own.getsockname() for name, own in spared.items()}
        self._peers = {}
        for name, own in spared.items():
            with contextlib.suppress(OSError):
                self._peers[name] = own.getpeername()

    def _leave_a_time_wait(self) -> None:
        own = self._dial(A4, TCP)
        accepted = self._accepted(own)
        self.time_wait = own.getsockname()[1]
        own.close()
        accepted.close()

    def _accepted(self, dialled: socket.socket) -> socket.socket:
        while True:
            accepted, client = self.spared["tcp4 listens"].accept()
            self._stack.callback(accepted.close)
            if client == dialled.getsockname():
                return accepted


def time_waits() -> set[int]:
    """Return the local ports of sockets in TIME-WAIT, in this thread's network namespace."""
    states = 1 << TCP_STATES.index("TIME-WAIT") + 1
    return {each.local_port for each in list_sockets(socket.IPPROTO_TCP, states=states)}


def unique(text: str) -> str:
    """Return a name that no other test has."""
    return f"sockhop-test-{os.getpid()}-{text}"
