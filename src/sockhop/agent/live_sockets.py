"""Sockets of all network namespaces, as rows for people and programs. Works without an agent."""

import logging
import socket
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import msgspec

from sockhop.agent.expression import Expression, Subject
from sockhop.agent.installed import read_services
from sockhop.agent.target import split_service_port
from sockhop.datapath.balancer import BalanceMaps, NotInstalled
from sockhop.datapath.listing import PROTOCOLS, Listing
from sockhop.datapath.records import REASONS, Provenance
from sockhop.datapath.sockets import Socket
from sockhop.kernel import netns
from sockhop.kernel.namespaces import Namespaces, mounted_names
from sockhop.kernel.procfs import Holder, find_holders
from sockhop.model import endpoint, is_loopback, unpack_address

__all__ = ["SocketRow", "balanced_and_unmanaged", "chosen_sockets", "socket_rows"]

_LOG = logging.getLogger(__name__)
_PROTOCOLS = {
    socket.IPPROTO_TCP: "TCP",
    socket.IPPROTO_UDP: "UDP",
    socket.IPPROTO_RAW: "RAW",
}


class SocketRow(msgspec.Struct):
    """A socket. Of one that is not balanced, all from `frontend` to `backend_id` is empty.

    `unmanaged`: nothing is remembered of it. `remote`: its real peer; `backend`: the same, where it
    is still with the backend that it was given. `age` in seconds since it was balanced, None where
    it never was. `sent` (and acknowledged) and `received` in bytes, `waiting` those that the peer
    has not acknowledged: 0 for all but TCP. `processes` as command/pid; `netns` an inode, `name`
    where that namespace is mounted, as a name of `ip netns` or a path.
    """

    protocol: str
    state: str
    local: str
    remote: str
    unmanaged: bool
    frontend: str
    backend: str
    service: str
    reason: str
    age: float | None
    generation: int
    backend_id: int
    processes: list[str]
    sent: int
    received: int
    waiting: int
    cookie: int
    cgroup: int
    netns: int
    name: str

    @property
    def shown_service(self) -> str:
        """For people: the service, or that nothing is remembered."""
        return "unmanaged" if self.unmanaged else self.service

    @property
    def shown_netns(self) -> str:
        """For people: the namespace's name, or its inode."""
        return self.name or str(self.netns)


def chosen_sockets(pins: Path, expression: Expression) -> list[Subject]:
    """Return the sockets of all namespaces that *expression* means; raw ones if it asks for them.

    Sockets in namespaces that cannot be entered are among them if they are balanced.
    """
    protocols = (*PROTOCOLS, *((socket.IPPROTO_RAW,) if "raw" in expression.uses else ()))
    with Listing(pins) as listing:
        found = _list_all(listing, protocols)
        known = {each.cookie for each in found}
        found += [each for each in listing.remembered() if each.cookie not in known]
    holders = find_holders({each.inode for each in found} - {0}) if "pid" in expression.uses else {}
    names = _service_names(pins)
    subjects = [_subject(each, names, holders) for each in found]
    return [each for each in subjects if expression.matches(each)]


def balanced_and_unmanaged(pins: Path) -> list[Subject]:
    """Return the balanced sockets that are with their backend, and those that look like them.

    A socket that is connected to a frontend or to a backend, and of which nothing is remembered, is
    older than the agent, or somebody dialled the backend itself.
    """
    with Listing(pins) as listing, BalanceMaps(pins) as maps:
        ends = _Ends.read(maps)
        others = [
            each
            for each in _list_all(listing, PROTOCOLS)
            if each.origin is None and each.is_open and ends.has(each)
        ]
        balanced = [each for each in listing.remembered() if each.current]
        names = read_services(maps)
    known = {each.cookie for each in balanced}
    found = balanced + [each for each in others if each.cookie not in known]
    return [_subject(each, names, {}) for each in found]


def socket_rows(subjects: Iterable[Subject]) -> list[SocketRow]:
    """Return a row for each, with its processes; the unmanaged first, then the oldest."""
    subjects = list(subjects)
    holders = find_holders({each.socket.inode for each in subjects} - {0})
    names, now = mounted_names(), time.clock_gettime_ns(time.CLOCK_BOOTTIME)
    rows = [_row(each, holders, names, now) for each in subjects]
    return sorted(rows, key=lambda row: (row.age is not None, -(row.age or 0), row.cookie))


class _Ends(NamedTuple):
    """Protocols, addresses and ports of what is installed; on loopback they are our namespace's."""

    everywhere: frozenset[tuple[int, bytes, int]]
    here: frozenset[tuple[int, bytes, int]]
    netns: int

    @staticmethod
    def read(maps: BalanceMaps) -> "_Ends":
        installed = {(key.protocol, key.address, key.port) for key in maps.frontends.keys()}
        installed |= {(r.protocol, r.address, r.port) for _, r in maps.backends.items()}
        here = {each for each in installed if is_loopback(unpack_address(each[1]))}
        return _Ends(frozenset(installed - here), frozenset(here), netns.inode())

    def has(self, each: Socket) -> bool:
        peer = (each.protocol, each.remote_address, each.remote_port)
        return peer in self.everywhere or (each.netns == self.netns and peer in self.here)


def _list_all(listing: Listing, protocols: Iterable[int]) -> list[Socket]:
    namespaces = Namespaces()
    found = listing.everywhere(namespaces.all(), protocols, progress=True)
    if namespaces.closed:
        _LOG.warning(
            "%d network namespaces could not be entered, which takes CAP_SYS_ADMIN: "
            "of their sockets, only balanced ones are seen",
            len(namespaces.closed),
        )
    return found


def _service_names(pins: Path) -> dict[int, str]:
    with suppress(NotInstalled), BalanceMaps(pins) as maps:
        return read_services(maps)
    return {}


def _subject(each: Socket, names: dict[int, str], holders: dict[int, list[Holder]]) -> Subject:
    pair = each.pair
    service = names.get(pair.service, f"id {pair.service}, which is gone") if pair else ""
    return Subject(each, service, frozenset(held.pid for held in holders.get(each.inode, [])))


def _row(
    subject: Subject, holders: dict[int, list[Holder]], names: dict[int, str], now: int
) -> SocketRow:
    each = subject.socket
    row = SocketRow(
        protocol=_PROTOCOLS[each.protocol],
        state=each.state_name,
        local=endpoint(unpack_address(each.local_address), each.local_port),
        remote=endpoint(unpack_address(each.remote_address), each.remote_port),
        unmanaged=each.origin is None,
        frontend="",
        backend="",
        service="",
        reason="",
        age=None,
        generation=0,
        backend_id=0,
        processes=sorted({str(held) for held in holders.get(each.inode, [])}),
        sent=each.acknowledged,
        received=each.received,
        waiting=each.waiting,
        cookie=each.cookie,
        cgroup=each.cgroup,
        netns=each.netns,
        name=names.get(each.netns, ""),
    )
    if each.origin:
        _add_origin(row, each, each.origin, subject.service, now)
    return row


def _add_origin(row: SocketRow, each: Socket, origin: Provenance, service: str, now: int) -> None:
    row.frontend = endpoint(unpack_address(origin.frontend_address), origin.frontend_port)
    row.backend = row.remote if each.pair else ""
    row.service = split_service_port(service)[0]
    row.reason = REASONS[origin.reason]
    row.age = (now - origin.since) / 1e9
    row.generation = origin.generation
    row.backend_id = each.pair.backend if each.pair else 0
