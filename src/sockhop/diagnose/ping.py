"""Asks an address for an ICMP echo (RFC 792, RFC 4443), as ping does."""

import os
import socket
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress

from sockhop.kernel.namespaces import Namespace, entered
from sockhop.model import unpack_address

__all__ = ["ping"]

_ECHO = struct.Struct("!BBHHH8s")  # type, code, checksum, identifier, sequence, what comes back
_TYPES = {socket.AF_INET: (8, 0), socket.AF_INET6: (128, 129)}
_EVERY = 0.2


def ping(place: Namespace | None, address: bytes, *, count: int = 3) -> float | None:
    """Return the seconds until a packed *address* answers, the first of *count* echoes that does.

    None if none does within 0.2 s, or if they cannot be sent. *place*: from there (None: from
    here). Needs CAP_NET_RAW.
    """
    to = unpack_address(address)
    family = socket.AF_INET6 if ":" in to else socket.AF_INET
    with suppress(OSError), _raw(place, family) as raw:
        for sequence in range(count):
            mark = os.urandom(8)
            begin = time.monotonic()
            raw.sendto(_echo(family, sequence, mark), (to, 0))
            while (left := begin + _EVERY - time.monotonic()) > 0:
                raw.settimeout(left)
                try:
                    data = raw.recv(256)
                except TimeoutError:
                    break
                if _answers(family, data, mark):
                    return time.monotonic() - begin
    return None


@contextmanager
def _raw(place: Namespace | None, family: socket.AddressFamily) -> Iterator[socket.socket]:
    protocol = socket.IPPROTO_ICMPV6 if family == socket.AF_INET6 else socket.IPPROTO_ICMP
    with entered(place) if place else nullcontext():
        made = socket.socket(family, socket.SOCK_RAW, protocol)
    with made:
        yield made


def _echo(family: socket.AddressFamily, sequence: int, mark: bytes) -> bytes:
    kind = _TYPES[family][0]
    plain = _ECHO.pack(kind, 0, 0, os.getpid() & 0xFFFF, sequence, mark)
    # The kernel fills in the checksum of ICMPv6.
    return _ECHO.pack(kind, 0, _checksum(plain), os.getpid() & 0xFFFF, sequence, mark)


def _answers(family: socket.AddressFamily, data: bytes, mark: bytes) -> bool:
    """Whether this is the answer to the echo with *mark*; IPv4 comes with its header."""
    at = (data[0] & 15) * 4 if family == socket.AF_INET and data else 0
    return data[at : at + 1] == bytes([_TYPES[family][1]]) and data[at + 8 : at + 16] == mark


def _checksum(data: bytes) -> int:
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    total = (total & 0xFFFF) + (total >> 16)
    return ~(total + (total >> 16)) & 0xFFFF
