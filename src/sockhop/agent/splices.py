"""What is spliced, as rows for people and programs. Works without an agent."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import msgspec

from sockhop.agent.installed import read_services
from sockhop.agent.target import split_service_port
from sockhop.datapath.balancer import BalanceMaps, NotInstalled
from sockhop.datapath.splice_records import (
    LaneMode,
    SpliceCounters,
    SpliceReason,
    reason_counts,
)
from sockhop.datapath.splicer import SplicedSocket, SpliceMaps, Sweeper
from sockhop.kernel.procfs import find_holders
from sockhop.model import endpoint, unpack_address

__all__ = ["ServiceSplices", "SpliceRow", "count_splices", "list_splices"]


class SpliceRow(msgspec.Struct):
    """A socket in the sockhash. `direction`: how what it sends goes; `why`: if not spliced.

    `spliced` and `stack` in bytes sent; `unread`: whether its own queue has spliced bytes;
    `budget` and `leave_after` as in :class:`sockhop.model.SpliceLimits`; `peer`: the cookie of the
    other end, 0 before the first message; `age` in seconds.
    """

    state: str
    local: str
    remote: str
    service: str
    direction: str
    why: str
    spliced: int
    stack: int
    unread: bool
    budget: int
    leave_after: int
    age: float
    processes: list[str]
    cookie: int
    peer: int
    netns: int


class ServiceSplices(NamedTuple):
    """The counters of a service; both names are "" for what was opted in otherwise."""

    service: str
    port: str
    counters: SpliceCounters
    reasons: dict[SpliceReason, int]


def list_splices(maps: BalanceMaps, pins: Path) -> list[SpliceRow]:
    """Return the sockets of all network namespaces that are in the sockhash, the youngest last."""
    try:
        with Sweeper(pins) as sweeper:
            sockets = sweeper.sockets()
    except NotInstalled:
        return []
    names = read_services(maps)
    owners = find_holders({found.socket.inode for found in sockets} - {0})
    now = time.clock_gettime(time.CLOCK_BOOTTIME)
    rows = [
        _row(
            found,
            split_service_port(names.get(found.lane.service, ""))[0],
            sorted({str(holder) for holder in owners.get(found.socket.inode, [])}),
            now,
        )
        for found in sockets
    ]
    return sorted(rows, key=lambda row: -row.age)


def _row(found: SplicedSocket, service: str, processes: list[str], now: float) -> SpliceRow:
    lane = found.lane
    (local, port), (remote, remote_port) = found.local, found.remote
    return SpliceRow(
        state=found.state,
        local=endpoint(unpack_address(local), port),
        remote=endpoint(unpack_address(remote), remote_port),
        service=service,
        direction=LaneMode(lane.mode).name.lower(),
        why=SpliceReason(lane.reason).text,
        spliced=lane.spliced,
        stack=lane.stacked,
        unread=not found.socket.queue_empty,
        budget=lane.budget,
        leave_after=lane.leave_after,
        age=round(now - lane.since / 1e9, 3),
        processes=processes,
        cookie=found.socket.cookie,
        peer=lane.peer,
        netns=found.socket.netns_inode,
    )


def count_splices(maps: BalanceMaps, pins: Path) -> Iterator[ServiceSplices]:
    """Yield the counters of every service that was ever spliced since the maps were made."""
    names = read_services(maps)
    try:
        with SpliceMaps(pins) as spliced:
            counted = spliced.counters.items()
    except NotInstalled:
        return
    for number, counters in sorted(counted):
        if not number or number in names:
            service, port = split_service_port(names.get(number, ""))
            yield ServiceSplices(service, port, counters, reason_counts(counters))
