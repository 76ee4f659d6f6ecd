"""Makes fresh connections, as a health check does, and says how each went."""

import errno
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple, Self

import msgspec

from sockhop.diagnose.frontends import Address
from sockhop.kernel.namespaces import Namespace, entered
from sockhop.model import endpoint, unpack_address

__all__ = ["Attempt", "Dialling", "Question", "Result", "dialled"]

_SMALL = 536
"""Bytes of a segment that pass everywhere (RFC 9293, 3.7.1)."""


class Result(StrEnum):
    """How an attempt went."""

    ANSWERED = "answered"
    CONNECTED = "connected"
    REFUSED = "refused"
    DENIED = "denied"
    UNREACHABLE = "unreachable"
    NO_PORT = "no free local port"
    TIMEOUT = "connect timed out"
    SILENT = "no answer"
    CLOSED = "closed without an answer"

    @property
    def is_good(self) -> bool:
        """Whether nothing is wrong."""
        return self in (Result.ANSWERED, Result.CONNECTED)


@dataclass(frozen=True)
class Question:
    """What to dial: a packed `address` and a TCP `port`; and how: `count` times.

    `path`: what to ask for with HTTP on each connection, "": only connect; `timeout`: seconds that
    a connection, and an answer, may take.
    """

    address: bytes
    port: int
    path: str = ""
    count: int = 5
    timeout: float = 1

    @property
    def name(self) -> str:
        """The target as people write it."""
        return endpoint(unpack_address(self.address), self.port)

    @property
    def request(self) -> bytes:
        """What to send, b"" for nothing."""
        if not self.path:
            return b""
        lines = (f"GET {self.path} HTTP/1.1", f"Host: {self.name}", "Connection: close", "", "")
        return "\r\n".join(lines).encode()


class Dialling(msgspec.Struct, frozen=True):
    """What came of dialling from one place: how many attempts ended how.

    `compared`: that place was not asked for, but tried to tell where the fault lies. `backend`:
    only those that went there count.
    """

    origin: str
    attempts: int
    failed: int
    results: dict[Result, int]
    compared: bool = False
    backend: str = ""

    @property
    def percent(self) -> int:
        """How many of 100 fail."""
        return round(100 * self.failed / self.attempts)

    @classmethod
    def of(
        cls,
        origin: str,
        results: Mapping[Result, int],
        *,
        compared: bool = False,
        backend: str = "",
    ) -> Self:
        """Return what these results mean."""
        failed = sum(n for result, n in results.items() if not result.is_good)
        return cls(origin, sum(results.values()), failed, dict(results), compared, backend)


class Attempt(NamedTuple):
    """A connection that was tried: its result, an errno or 0, its socket, its backend.

    The socket is open if the attempt is the first at that backend that got no answer. `backend`:
    where it went instead of where it was dialled.
    """

    result: Result
    errno: int
    seconds: float
    socket: socket.socket
    backend: Address | None

    @property
    def kind(self) -> tuple[Result, Address | None]:
        """What attempts have in common that went alike."""
        return self.result, self.backend


_RESULTS = {
    errno.ECONNREFUSED: Result.REFUSED,
    errno.EPERM: Result.DENIED,
    errno.EACCES: Result.DENIED,
    errno.EHOSTUNREACH: Result.UNREACHABLE,
    errno.ENETUNREACH: Result.UNREACHABLE,
    errno.EADDRNOTAVAIL: Result.NO_PORT,
    errno.ETIMEDOUT: Result.TIMEOUT,
}


@contextmanager
def dialled(
    place: Namespace | None,
    question: Question,
    *,
    small: bool = False,
    backend_of: Callable[[socket.socket], Address | None] = lambda _: None,
) -> Iterator[Sequence[Attempt]]:
    """Connect one time after the other, and have the attempts while the body runs.

    *place*: from there (None: from here). *small*: ask for small segments. *backend_of* tells where
    a socket went. NamespaceGone where *place* is.
    """
    attempts: list[Attempt] = []
    try:
        for _ in range(question.count):
            made = _attempt(place, question, small=small, backend_of=backend_of)
            if any(each.kind == made.kind for each in attempts):
                made.socket.close()
            attempts.append(made)
        yield attempts
    finally:
        for each in attempts:
            each.socket.close()


def _attempt(
    place: Namespace | None,
    question: Question,
    *,
    small: bool,
    backend_of: Callable[[socket.socket], Address | None],
) -> Attempt:
    address = unpack_address(question.address)
    with entered(place) if place else nullcontext():
        made = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
    made.settimeout(question.timeout)
    if small:
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, _SMALL)
    begin, number = time.monotonic(), 0
    connected = False
    try:
        made.connect((address, question.port))
        connected = True
        result = _ask(made, question.request) if question.path else Result.CONNECTED
    except TimeoutError:
        result = Result.SILENT if connected else Result.TIMEOUT
    except OSError as error:
        number = error.errno or 0
        result = Result.CLOSED if connected else _RESULTS.get(number, Result.UNREACHABLE)
    seconds, backend = time.monotonic() - begin, backend_of(made)
    if result is not Result.SILENT:
        made.close()
    return Attempt(result, number, seconds, made, backend)


def _ask(made: socket.socket, request: bytes) -> Result:
    made.sendall(request)
    return Result.ANSWERED if made.recv(1) else Result.CLOSED
