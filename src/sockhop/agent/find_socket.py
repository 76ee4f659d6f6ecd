"""Finds the one socket that a person names, in whatever network namespace it is."""

import itertools
import os
import re
import socket
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import NamedTuple, TypeAlias

from sockhop.datapath.sockets import TCP_STATES, Sockets
from sockhop.errors import InputError, SockhopError
from sockhop.kernel.cookies import socket_cookie
from sockhop.kernel.netns import current_cookie, entered, inode
from sockhop.kernel.procfs import (
    Holder,
    borrowed,
    find_holders,
    network_namespaces,
    socket_inode,
)
from sockhop.kernel.sockdiag import DiagSocket, list_sockets
from sockhop.kernel.syscall import KernelError
from sockhop.model import endpoint, pack_address, parse_address, unpack_address

__all__ = ["FoundSocket", "cookie_at", "cookie_of", "endpoint_in", "find_socket"]

_ENDPOINT = r"(?:\[[0-9A-Fa-f:.]+\]|[0-9.]+):\d+"
_TUPLE = re.compile(rf"({_ENDPOINT})(?:(?:->|>|-)({_ENDPOINT}))?(?:/(tcp|udp))?")
_NAMES = {socket.IPPROTO_TCP: "tcp", socket.IPPROTO_UDP: "udp"}
_LISTEN = TCP_STATES.index("LISTEN") + 1
_DESCRIPTOR = r"\d+:\d+"
_SHOWN = 5

_End: TypeAlias = tuple[bytes, int]


class FoundSocket(NamedTuple):
    """A socket, the inode and the cookie of its network namespace, and who holds it."""

    socket: DiagSocket
    netns: int
    netns_cookie: int
    holders: list[Holder]


_Place: TypeAlias = tuple[DiagSocket, int, int]
"""The first three of them."""


def find_socket(text: str, pins: Path) -> FoundSocket:
    """Find the socket that *text* names: PID:FD, COOKIE, LOCAL>REMOTE, or one of its ends.

    REMOTE is the real peer or the frontend that was dialled. InputError where *text* is none of
    that or names several sockets, SockhopError where there is no such socket.
    """
    if re.fullmatch(_DESCRIPTOR, text):
        found = _by_descriptor(*map(int, text.split(":")))
    elif (cookie := cookie_of(text)) is not None:
        found = _first(lambda each: each.cookie == cookie)
    elif parts := _TUPLE.fullmatch(text):
        first, second, protocol = parts.groups()
        found = _by_ends(first, second, protocol, pins)
    else:
        raise InputError(
            f"{text!r} names no socket",
            hint="expected PID:FD, a COOKIE, LOCAL>REMOTE as 10.0.0.2:4312>10.1.0.2:53, "
            "or one of these ends",
        )
    if not found:
        raise SockhopError(f"{text}: there is no such TCP or UDP socket")
    if len(found) > 1:
        several = ", ".join(f"{each.cookie} ({_text(each)})" for each, *_ in found[:_SHOWN])
        raise InputError(
            f"{text}: {len(found)} sockets are meant by that",
            hint=f"name one by its cookie: {several}{', ...' if len(found) > _SHOWN else ''}",
        )
    only = found[0][0]
    return FoundSocket(*found[0], find_holders({only.inode} - {0}).get(only.inode, []))


def cookie_of(text: str) -> int | None:
    """Return the cookie that *text* is, as a number or in hex; None for anything else."""
    if re.fullmatch(r"\d+", text):
        return int(text)
    hexadecimal = re.fullmatch(r"(?:0x|sk:)([0-9A-Fa-f]+)", text)
    return int(hexadecimal[1], 16) if hexadecimal else None


def cookie_at(text: str) -> int | None:
    """Return the cookie of the socket that *text*, PID:FD, names, connected or not.

    None for anything else, and where it cannot be had.
    """
    if not re.fullmatch(_DESCRIPTOR, text):
        return None
    pid, number = map(int, text.split(":"))
    with suppress(KernelError, OSError), borrowed(Holder("", pid, number)) as own:
        return socket_cookie(own)
    return None


def endpoint_in(text: str) -> tuple[bytes, int] | None:
    """Return the far end that *text*, REMOTE or LOCAL>REMOTE, names; None for anything else."""
    parts = None if re.fullmatch(_DESCRIPTOR, text) else _TUPLE.fullmatch(text)
    return _end(parts[2] or parts[1]) if parts else None


def _by_descriptor(pid: int, fd: int) -> list[_Place]:
    try:
        target = os.readlink(f"/proc/{pid}/fd/{fd}")
    except FileNotFoundError:
        raise SockhopError(f"{pid}:{fd}: there is no such process or descriptor") from None
    except OSError as error:
        raise SockhopError(f"{pid}:{fd}: {error.strerror}", hint="run as root") from None
    number = socket_inode(target)
    if not number:
        raise SockhopError(f"{pid}:{fd} is no socket but {target}")
    found = _first(lambda each: each.inode == number)
    if not found:
        raise SockhopError(
            f"{pid}:{fd} is in no table of TCP and UDP sockets",
            hint="it is of another kind, or a TCP socket that is not connected",
        )
    return found


def _by_ends(first: str, second: str | None, protocol: str | None, pins: Path) -> list[_Place]:
    """Return the sockets that the most likely meaning fits: see the order of the tests."""
    one = _end(first)
    places = [place for place in _all() if protocol in (None, _NAMES[place[0].protocol])]
    tests: tuple[Callable[[DiagSocket], bool], ...]
    if second is not None:
        other = _end(second)
        tests = (
            lambda each: _local(each) == one and _remote(each) == other,
            lambda each: _local(each) == one and each.cookie in _dialled(other, pins),
        )
    else:
        tests = (
            lambda each: _local(each) == one and each.state != _LISTEN,
            lambda each: _remote(each) == one,
            lambda each: each.cookie in _dialled(one, pins),
            lambda each: _local(each) == one,
        )
    for test in tests:
        if found := [place for place in places if test(place[0])]:
            return found
    return []


@cache
def _dialled(frontend: _End, pins: Path) -> frozenset[int]:
    """Return the cookies of the sockets that have dialled *frontend*."""
    with Sockets(pins) as programs:
        found = programs.remembered()
    return frozenset(
        each.cookie
        for each in found
        if each.origin and (each.origin.frontend_address, each.origin.frontend_port) == frontend
    )


def _all() -> Iterator[_Place]:
    """Yield all sockets, those of our own network namespace first; entering others needs rights."""
    own = inode()
    yield from _here(own)
    for number, path in network_namespaces().items():
        found: list[_Place] = []
        if number != own:
            with suppress(InputError), entered(path):  # InputError: it has just gone
                found = _here(number)
        yield from found


def _here(netns: int) -> list[_Place]:
    cookie = current_cookie()
    return [(each, netns, cookie) for protocol in _NAMES for each in list_sockets(protocol)]


def _first(test: Callable[[DiagSocket], bool]) -> list[_Place]:
    return list(itertools.islice((place for place in _all() if test(place[0])), 1))


def _end(text: str) -> _End:
    host, _, port = text.rpartition(":")
    try:
        return pack_address(parse_address(host.strip("[]"))), int(port)
    except ValueError as error:
        raise InputError(f"{text}: {error}") from None


def _local(each: DiagSocket) -> _End:
    return each.local_address, each.local_port


def _remote(each: DiagSocket) -> _End:
    return each.remote_address, each.remote_port


def _text(each: DiagSocket) -> str:
    local = endpoint(unpack_address(each.local_address), each.local_port)
    remote = endpoint(unpack_address(each.remote_address), each.remote_port)
    return f"{local}>{remote}/{_NAMES[each.protocol]}"
