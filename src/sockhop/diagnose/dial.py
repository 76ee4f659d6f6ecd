"""Makes fresh connections, as a health check does, and says how each went."""

import errno
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from enum import StrEnum
from typing import NamedTuple

from sockhop.kernel.namespaces import Namespace, entered
from sockhop.model import unpack_address

__all__ = ["Attempt", "Result", "dialled"]

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


class Attempt(NamedTuple):
    """A connection that was tried: its result, an errno or 0, and its socket.

    That is open if the attempt is the first that got no answer.
    """

    result: Result
    errno: int
    seconds: float
    socket: socket.socket


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
    target: tuple[bytes, int],
    request: bytes,
    *,
    count: int = 1,
    timeout: float = 1,
    small: bool = False,
) -> Iterator[Sequence[Attempt]]:
    """Connect *count* times, one after the other, and have the attempts while the body runs.

    *place*: from there (None: from here). *target*: a packed address and a port. *request* is sent
    on each connection, and an answer waited for, *timeout* seconds; b"": only connect. *small*: ask
    for small segments. NamespaceGone where *place* is.
    """
    attempts: list[Attempt] = []
    try:
        for _ in range(count):
            made = _attempt(place, target, request, timeout, small=small)
            if any(each.result is made.result is Result.SILENT for each in attempts):
                made.socket.close()
            attempts.append(made)
        yield attempts
    finally:
        for each in attempts:
            each.socket.close()


def _attempt(
    place: Namespace | None,
    target: tuple[bytes, int],
    request: bytes,
    timeout: float,
    *,
    small: bool,
) -> Attempt:
    address = unpack_address(target[0])
    with entered(place) if place else nullcontext():
        made = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
    made.settimeout(timeout)
    if small:
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, _SMALL)
    begin, number = time.monotonic(), 0
    connected = False
    try:
        made.connect((address, target[1]))
        connected = True
        result = _ask(made, request) if request else Result.CONNECTED
    except TimeoutError:
        result = Result.SILENT if connected else Result.TIMEOUT
    except OSError as error:
        number = error.errno or 0
        result = Result.CLOSED if connected else _RESULTS.get(number, Result.UNREACHABLE)
    if result is not Result.SILENT:
        made.close()
    return Attempt(result, number, time.monotonic() - begin, made)


def _ask(made: socket.socket, request: bytes) -> Result:
    made.sendall(request)
    return Result.ANSWERED if made.recv(1) else Result.CLOSED
