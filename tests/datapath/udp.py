"""UDP without threads: servers that answer when the test says so, and the ways to receive."""

import ctypes
import select
import socket
import struct
from collections.abc import Callable
from typing import NamedTuple

from tests.clients.dialers import family_of

__all__ = ["FORMS", "RECEIVERS", "Answer", "Echoes", "Request", "both", "connect_raw", "udp"]

SECONDS = 5
FORMS = {"IPv4": "10.9.0.{}", "IPv6": "fd00:9::{}", "mapped": "::ffff:10.9.0.{}"}
"""What a client dials to reach the service with a number."""


def both(*numbers: int) -> list[str]:
    """Return the endpoints, IPv4 and IPv6, of the servers with these numbers."""
    return [text for n in numbers for text in (f"127.0.1.{n}:7000", f"[::1]:{7000 + n}")]


def udp(form: str) -> socket.socket:
    """Return a new socket of the family that dials addresses of *form*."""
    client = socket.socket(family_of(form), socket.SOCK_DGRAM)
    client.settimeout(SECONDS)
    return client


class Answer(NamedTuple):
    """Which server has answered, and from where that came as the client sees it."""

    server: int
    source: tuple[str, int]


class Request(NamedTuple):
    """A datagram that a server has and has not answered."""

    server: int
    data: bytes
    reply: Callable[[], object]


class Echoes:
    """*n* servers, each at both(number), that answer with their number."""

    def __init__(self, n: int, *, first: int = 1) -> None:
        self._poll = select.poll()
        self._servers: dict[int, tuple[int, socket.socket]] = {}
        for number in range(first, first + n):
            for text in both(number):
                host, _, port = text.rpartition(":")
                server = socket.socket(family_of(host), socket.SOCK_DGRAM)
                server.bind((host.strip("[]"), int(port)))
                self._poll.register(server, select.POLLIN)
                self._servers[server.fileno()] = number, server

    def __enter__(self) -> "Echoes":
        return self

    def __exit__(self, *error: object) -> None:
        for _, server in self._servers.values():
            server.close()

    def received(self) -> Request:
        """Wait for a datagram."""
        ready = self._poll.poll(SECONDS * 1000)
        assert ready, "no server has received anything"
        number, server = self._servers[ready[0][0]]
        data, sender = server.recvfrom(100)
        return Request(number, data, lambda: server.sendto(str(number).encode(), sender))

    def answer(self, client: socket.socket, to: tuple[str, int]) -> int:
        """Send a datagram from *client* and answer it; return who did."""
        client.sendto(b"who?", to)
        request = self.received()
        request.reply()
        return request.server

    def ask(self, client: socket.socket, host: str, port: int = 53) -> Answer:
        """Send a datagram from *client*, answer it and receive the answer."""
        server = self.answer(client, (host, port))
        data, source = client.recvfrom(100)
        assert int(data) == server
        return Answer(server, source[:2])


# --- ways to receive -------------------------------------------------------------------------


def _by_recvfrom(client: socket.socket) -> tuple[str, int]:
    return client.recvfrom(100)[1][:2]  # type: ignore[no-any-return]


def _by_recvmsg(client: socket.socket) -> tuple[str, int]:
    return client.recvmsg(100, 100)[3][:2]  # type: ignore[no-any-return]


class _Vector(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("len", ctypes.c_size_t))


class _Message(ctypes.Structure):
    """struct mmsghdr of recvmmsg(2)."""

    _fields_ = (
        ("name", ctypes.c_void_p),
        ("namelen", ctypes.c_uint),
        ("iov", ctypes.POINTER(_Vector)),
        ("iovlen", ctypes.c_size_t),
        ("control", ctypes.c_void_p),
        ("controllen", ctypes.c_size_t),
        ("flags", ctypes.c_int),
        ("len", ctypes.c_uint),
    )


def _by_recvmmsg(client: socket.socket) -> tuple[str, int]:
    assert select.select([client], [], [], SECONDS)[0]
    name, data = ctypes.create_string_buffer(28), ctypes.create_string_buffer(100)
    vector = _Vector(ctypes.addressof(data), len(data))
    message = _Message(
        name=ctypes.addressof(name), namelen=len(name), iov=ctypes.pointer(vector), iovlen=1
    )
    got = ctypes.CDLL(None).recvmmsg(client.fileno(), ctypes.byref(message), 1, 0, None)
    assert got == 1
    return parse_sockaddr(name.raw)


def parse_sockaddr(raw: bytes) -> tuple[str, int]:
    """Return address and port of a struct sockaddr_in or sockaddr_in6."""
    (family,) = struct.unpack_from("=H", raw)
    form = "!2xH4s" if family == socket.AF_INET else "!2xH4x16s"
    port, address = struct.unpack_from(form, raw)
    return socket.inet_ntop(family, address), port


RECEIVERS: dict[str, Callable[[socket.socket], tuple[str, int]]] = {
    "recvfrom": _by_recvfrom,
    "recvmsg": _by_recvmsg,
    "recvmmsg": _by_recvmmsg,
}
"""Each receives a datagram and returns where it came from."""


def connect_raw(client: socket.socket, address: bytes) -> None:
    """connect(2) with any bytes as address: Python offers no AF_UNSPEC."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.connect(client.fileno(), address, len(address)):
        raise OSError(ctypes.get_errno(), "connect")
