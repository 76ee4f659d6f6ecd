"""Deletes stale entries of sockhashes: those that two looks call stale and that still are."""

import errno
import os
import socket
import struct
from collections.abc import Mapping, Sequence
from enum import StrEnum
from pathlib import Path

import msgspec

from sockhop.datapath.ending import Action, EngineName, choose_engine
from sockhop.datapath.listing import Listing
from sockhop.datapath.sockets import CONNECTED, Socket, read_iterator
from sockhop.diagnose.audit import Audit, Entry, Held
from sockhop.diagnose.pairs import PairCheck
from sockhop.diagnose.records import Doom, HealRecord, HealResult
from sockhop.diagnose.visit import OpenMap
from sockhop.kernel._libbpf import lib
from sockhop.kernel.btf import Codec
from sockhop.kernel.maps import Map
from sockhop.kernel.namespaces import Namespaces
from sockhop.kernel.objects import BpfObject, object_path
from sockhop.kernel.procfs import find_holders
from sockhop.kernel.syscall import check
from sockhop.model import endpoint, unpack_address

__all__ = ["Healed", "Outcome", "Severed", "advice", "heal", "plan", "sever_victims"]


class Outcome(StrEnum):
    """What became of a stale entry, or would."""

    WOULD = "would delete"
    DELETED = "deleted"
    CHANGED = "left: it has changed"
    UNREAD = "left: unread bytes"
    GONE = "left: it is gone"
    REFUSED = "refused by the kernel"

    @property
    def is_left(self) -> bool:
        """Whether a stale entry is still there."""
        return self not in (Outcome.DELETED, Outcome.GONE, Outcome.CHANGED)


class Healed(msgspec.Struct, frozen=True):
    """A stale entry of a map and its outcome.

    `lost` are the unread bytes that went (or would go) with it; `more`: and some that were not
    counted. `processes` hold the entry's socket.
    """

    map: int
    name: str
    entry: Entry
    outcome: Outcome
    lost: int
    more: bool
    reason: str
    processes: list[str]


class Severed(msgspec.Struct, frozen=True):
    """A victim of a stale entry, and what became of it: severed, gone or refused, and why."""

    local: str
    remote: str
    cookie: int
    netns: int
    outcome: Action
    reason: str
    processes: list[str]


def plan(audits: Sequence[Audit], *, lose_unread: bool = False) -> list[Healed]:
    """Return what :func:`heal` would do now. Nothing is changed."""
    found = []
    for audit in _healable(audits):
        holders = _holders(audit)
        for held in audit.stale.values():
            entry = held.described()
            unread = entry.unread or entry.unread_more
            outcome = Outcome.UNREAD if unread and not lose_unread else Outcome.WOULD
            found.append(_healed(audit, held, outcome, (entry.unread, entry.unread_more), holders))
    return found


def heal(
    audits: Sequence[Audit], *, lose_unread: bool = False, path: Path | None = None
) -> list[Healed]:
    """Delete the entries that *audits* call stale, if they still are; an outcome for each.

    An entry goes only if the same socket is under the key, with the same ends and in the same
    state, and no spliced bytes are unread (*lose_unread*: even then). The look and the deletion are
    one run of a program in the kernel. *path*: another object file, for tests. SystemLackError
    where the kernel refuses the program.
    """
    found = []
    for audit in _healable(audits):
        holders = _holders(audit)
        results = _delete(audit.look.map, audit.stale, lose=lose_unread, path=path)
        for key, held in audit.stale.items():
            record = results.get(key)
            if record is None:
                found.append(_healed(audit, held, Outcome.GONE, (0, False), holders))
                continue
            outcome = _OUTCOMES[HealResult(record.result)]
            reason = errno.errorcode.get(record.error, str(record.error)) if record.error else ""
            count = (record.unread, bool(record.more))
            found.append(_healed(audit, held, outcome, count, holders, reason))
    return found


def sever_victims(pairs: PairCheck, pins: Path) -> list[Severed]:
    """End the harmed ends of half-spliced connections; the other ends then find ECONNRESET.

    *pins*: the bpffs directory of an agent, if there is one. SystemLackError where the kernel has
    no SOCK_DESTROY.
    """
    victims = {each.victim.inode: each.victim for each in pairs.half_spliced if each.harmful}
    if not victims:
        return []
    places = Namespaces().by_inode({each.netns for each in victims.values()})
    with Listing(pins) as listing:
        found = listing.everywhere(places, (socket.IPPROTO_TCP,), states=CONNECTED)
    meant = [
        each
        for each in found
        if (victim := victims.get(each.inode))
        and (victim.local, victim.remote) == (_end(each, "local"), _end(each, "remote"))
    ]
    with choose_engine(pins, EngineName.NETLINK) as engine:
        outcomes = engine.sever_sockets(meant)
    return [
        Severed(
            *(_end(each.socket, "local"), _end(each.socket, "remote"), each.socket.cookie),
            *(each.socket.netns, each.action, each.reason),
            victims[each.socket.inode].processes,
        )
        for each in outcomes
    ]


def _end(of: Socket, which: str) -> str:
    address, port = getattr(of, f"{which}_address"), getattr(of, f"{which}_port")
    return endpoint(unpack_address(address), port)


def advice(healed: Sequence[Healed]) -> list[str]:
    """Return what else there is to do, in sentences: what made the entries, and where they stay."""
    found = []
    orphans = [each for each in healed if not each.entry.inode]
    if orphans:
        found.append(
            f"{len(orphans)} of the sockets belong to no process: they wait to be accepted, or the "
            "kernel has left them (as it may since kernel commit b8b8315e39ff). If such entries "
            "come back after healing, drain this node and reboot it"
        )
    owners = sorted({name for each in healed for name in each.processes})
    if owners:
        found.append(
            f"sockets whose connection is over, or is another by now, are kept open by "
            f"{', '.join(owners)}: where programs close them, no entry is left"
        )
    refused = sorted({each.reason for each in healed if each.outcome is Outcome.REFUSED})
    if refused:
        found.append(
            f"the kernel refuses to delete entries ({', '.join(refused)}): drain this node and "
            "reboot it; nothing else empties the map"
        )
    return found


_OUTCOMES = {
    HealResult.DELETED: Outcome.DELETED,
    HealResult.CHANGED: Outcome.CHANGED,
    HealResult.UNREAD: Outcome.UNREAD,
    HealResult.REFUSED: Outcome.REFUSED,
}


def _healable(audits: Sequence[Audit]) -> list[Audit]:
    """Return the sockhashes whose stale entries are in the way of others, and that have any."""
    return [
        each for each in audits if each.result.in_the_way and each.look.map.is_hash and each.stale
    ]


def _healed(
    audit: Audit,
    held: Held,
    outcome: Outcome,
    unread: tuple[int, bool],
    holders: Mapping[int, list[str]],
    reason: str = "",
) -> Healed:
    return Healed(
        *(audit.result.id, audit.result.name, held.described(), outcome, *unread, reason),
        holders.get(held.socket.inode, []),
    )


def _holders(audit: Audit) -> dict[int, list[str]]:
    found = find_holders({each.socket.inode for each in audit.stale.values()} - {0})
    return {inode: sorted({str(each) for each in owners}) for inode, owners in found.items()}


def _delete(
    of: OpenMap, stale: Mapping[bytes, Held], *, lose: bool, path: Path | None
) -> dict[bytes, HealRecord]:
    size = of.info.key_size
    with BpfObject(
        path or object_path("heal"),
        key_sizes={"doomed": size},
        max_entries={"doomed": len(stale)},
        given={"target": of.fd},
    ) as programs:
        dooms = programs.layouts.codec(Doom, "doom")
        records = programs.layouts.codec(HealRecord, "heal_record")
        with Map(os.dup(programs.map_fd("doomed")), _bytes_codec(size), dooms) as doomed:
            doomed.update_many((key, _doom(held, lose)) for key, held in stale.items())
        program = "sockhop_heal"
        link = check(lib.sockhop_iter_link(programs.program(program), of.fd), f"linking {program}")
        try:
            data = read_iterator(link, program)
        finally:
            os.close(link)
    step = records.size + size
    return {
        data[at + records.size : at + step]: records.decode(data[at : at + records.size])
        for at in range(0, len(data), step)
    }


def _doom(held: Held, lose: bool) -> Doom:
    of = held.socket
    return Doom(
        *(of.local_address, of.remote_address, of.sock, of.cookie),
        *(of.local_port, of.remote_port, of.state, int(lose)),
    )


def _bytes_codec(size: int) -> Codec[bytes]:
    return Codec(bytes, struct.Struct(f"={size}s"))
