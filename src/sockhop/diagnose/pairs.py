"""Puts together the two ends of each local TCP connection, and looks at whose functions serve them.

An end whose handlers are tcp_bpf splices what it sends to the socket that its program finds in a
map. Where the other end has plain handlers and its key is taken by another socket, the bytes go
there: the connection is established, and the request hangs.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence

import msgspec

from sockhop.diagnose.audit import Audit, EntryState, Held, audit
from sockhop.diagnose.keys import Ends, KeyLayout
from sockhop.diagnose.records import AuditFlag, AuditSocket, Handler
from sockhop.diagnose.visit import End, OpenMap, Visitor
from sockhop.kernel.namespaces import Namespace, Namespaces
from sockhop.kernel.procfs import find_holders

__all__ = [
    "HalfSpliced",
    "PairCheck",
    "Queued",
    "Side",
    "check_pairs",
    "examine",
    "match_pairs",
    "unread_from_stack",
]

_FIN_RECEIVED = ("CLOSE-WAIT", "LAST-ACK", "CLOSING")


class Side(msgspec.Struct, frozen=True):
    """One end of a connection. `receiver`: the kernel function that its recv() calls, if known.

    `netns` and `inode` are inodes, of the namespace and of the socket.
    """

    local: str
    remote: str
    handler: Handler
    receiver: str
    netns: int
    inode: int
    unread: int
    segs_in: int
    segs_out: int
    processes: list[str]


class HalfSpliced(msgspec.Struct, frozen=True):
    """A connection whose one end splices and whose other end, the victim, has plain handlers.

    `harmful`: a map has another socket under the victim's key; `map` is its id and `key` the key,
    `strayed` the bytes that wait in that socket (and maybe more).
    `still`: no segment moved between the two looks.
    """

    spliced: Side
    victim: Side
    harmful: bool
    cause: str
    still: bool
    map: int = 0
    key: str = ""
    strayed: int = 0


class Queued(msgspec.Struct, frozen=True):
    """A socket with bytes that nobody has read between the two looks: spliced and from the stack.

    `spliced_more`: more are spliced than were counted.
    """

    local: str
    remote: str
    state: str
    netns: int
    spliced: int
    spliced_more: bool
    stack: int
    processes: list[str]


class PairCheck(msgspec.Struct, frozen=True):
    """`sockets` looked at, `pairs` that splice and have both ends here, and what is odd."""

    sockets: int
    pairs: int
    half_spliced: list[HalfSpliced]
    queued: list[Queued]

    @property
    def findings(self) -> int:
        """How many connections are being harmed."""
        return sum(each.harmful for each in self.half_spliced)


def examine(
    visitor: Visitor,
    maps: Sequence[OpenMap],
    given: KeyLayout | None = None,
    *,
    wait: float = 1,
    places: Sequence[Namespace] | None = None,
) -> tuple[list[Audit], PairCheck]:
    """Look at *maps* and at the TCP sockets of all namespaces twice, *wait* seconds apart.

    *places*: only of these namespaces.
    """
    if places is None:
        places = Namespaces().all()
    first = visitor.ends(places)
    audits = audit(visitor, maps, given, wait)
    return audits, check_pairs(first, visitor.ends(places), audits)


def check_pairs(first: Sequence[End], last: Sequence[End], audits: Iterable[Audit]) -> PairCheck:
    """Compare two looks at all TCP sockets; *audits* tell who is under the victims' keys.

    A connection counts only if both its ends were the same at both looks.
    """
    before = {each.socket.sock: each for each in first}

    def is_steady(of: End) -> bool:
        old = before.get(of.socket.sock)
        return old is not None and old.socket.identity == of.socket.identity

    splicing = [each for each in last if _splices(each.socket) and is_steady(each)]
    wanted = {(_there(each.socket), _here(each.socket)) for each in splicing}
    others = [
        each
        for each in last
        if (_here(each.socket), _there(each.socket)) in wanted and not _splices(each.socket)
    ]
    pairs = list(match_pairs([*splicing, *filter(is_steady, others)]))
    halves = [
        ends
        for pair in pairs
        for ends in (pair, pair[::-1])
        if _is_half_spliced(*ends)
        and _is_half_spliced(*(before[each.socket.sock] for each in ends))
    ]
    waiting = [each for each in last if each.socket.spliced or unread_from_stack(each.socket)]
    queued = [
        each.socket
        for each in waiting
        if is_steady(each) and _is_queued(before[each.socket.sock].socket, each.socket)
    ]
    taken = _taken(audits) if halves else {}
    inodes = {each.socket.inode for ends in halves for each in ends}
    holders = _holders(inodes | {each.inode for each in queued})
    return PairCheck(
        len(last),
        len(pairs),
        [_half_spliced(*ends, before, taken, holders) for ends in halves],
        [_queued(each, holders) for each in queued],
    )


def match_pairs(ends: Sequence[End]) -> Iterator[tuple[End, End]]:
    """Yield the connections of which both ends are in *ends*, in whatever namespaces.

    The same addresses may be in use in several: sequence numbers tell which ends belong together.
    """
    waiting: defaultdict[object, list[End]] = defaultdict(list)
    for each in ends:
        here, there = _here(each.socket), _there(each.socket)
        others = waiting[there, here]
        for other in others:
            if _same_handshake(each.socket, other.socket):
                others.remove(other)
                yield other, each
                break
        else:
            waiting[here, there].append(each)


def _here(of: AuditSocket) -> tuple[bytes, int]:
    return of.local_address, of.local_port


def _there(of: AuditSocket) -> tuple[bytes, int]:
    return of.remote_address, of.remote_port


def _same_handshake(a: AuditSocket, b: AuditSocket) -> bool:
    return _follows(a, b) and _follows(b, a)


def _follows(a: AuditSocket, b: AuditSocket) -> bool:
    """Whether what *a* receives began with the number that *b* began with.

    Both counters are kept for RFC 4898. That of acknowledged bytes counts the SYN of a client.
    """
    return (a.rcv_nxt - a.received - b.snd_una + b.acknowledged) & 0xFFFFFFFF in (0, 1)


def _is_half_spliced(one: End, other: End) -> bool:
    """Whether *one* splices what it sends, and *other* does not know of splicing."""
    return _splices(one.socket) and other.socket.handler is Handler.TCP


def _splices(of: AuditSocket) -> bool:
    """Whether a program sees what it sends, and its handlers let it do so."""
    return bool(of.flags & AuditFlag.PARSER) and of.handler is Handler.TCP_BPF


def _is_queued(before: AuditSocket, now: AuditSocket) -> bool:
    # Reading takes bytes off the first message, and then the message.
    spliced = now.first > 0 and (before.first, before.first_size) == (now.first, now.first_size)
    stack = (
        unread_from_stack(before) > 0
        and unread_from_stack(now) > 0
        and before.copied_seq == now.copied_seq
    )
    return spliced or stack


def unread_from_stack(of: AuditSocket) -> int:
    """Return the bytes from the stack that have not been read; a FIN counts in sequence numbers."""
    return max(0, of.unread - (of.state_name in _FIN_RECEIVED))


def _taken(audits: Iterable[Audit]) -> dict[Ends, tuple[int, str, Held]]:
    """Return the entries by what their keys say, with their maps' ids and names."""
    return {
        each.ends: (audited.result.id, audited.result.name, each)
        for audited in audits
        if audited.result.in_the_way
        for each in audited.look.all()
    }


def _half_spliced(
    spliced: End,
    victim: End,
    before: Mapping[int, End],
    taken: Mapping[Ends, tuple[int, str, Held]],
    holders: Mapping[int, list[str]],
) -> HalfSpliced:
    held = victim.socket
    ends = Ends(held.local_address, held.remote_address, held.local_port, held.remote_port)
    number, name, entry = taken.get(ends, (0, "", None))
    other = entry is not None and entry.socket.sock != held.sock
    harmful = other and not _goes_by_stack(spliced.socket, held)
    if entry is None:
        cause = "no map that is understood has its key: what is sent to it goes by the stack"
    elif not other:
        cause = f"map {number} ({name}) has it, but its handlers are plain"
    elif not harmful:
        cause = f"map {number} ({name}) has another socket under its key, but bytes reach it"
    elif entry.state is EntryState.LIVE:
        cause = (
            f"map {number} ({name}) has another connection with the same addresses under its key, "
            f"of network namespace {entry.socket.netns}"
        )
    else:
        cause = f"map {number} ({name}) has a stale entry under its key ({entry.state})"
    old = [before[each.socket.sock].socket for each in (spliced, victim)]
    now = [each.socket for each in (spliced, victim)]
    return HalfSpliced(
        _side(spliced, holders),
        _side(victim, holders),
        harmful,
        cause,
        [(a.segs_in, a.segs_out) for a in old] == [(a.segs_in, a.segs_out) for a in now],
        number,
        entry.key.hex(" ") if entry else "",
        entry.socket.spliced if other and entry else 0,
    )


def _goes_by_stack(spliced: AuditSocket, victim: AuditSocket) -> bool:
    """Whether what *spliced* sends reaches its peer all the same.

    A client's SYN counts as one acknowledged byte. Where an IPv6 socket talks to an IPv4 one, the
    keys that programs make of the two ends differ, and nothing is found under them.
    """
    return spliced.acknowledged > 1 or spliced.family != victim.family


def _side(end: End, holders: Mapping[int, list[str]]) -> Side:
    held = end.socket
    return Side(
        *(held.local, held.remote, held.handler, end.receiver, held.netns, held.inode),
        *(unread_from_stack(held) + held.spliced, held.segs_in, held.segs_out),
        holders.get(held.inode, []),
    )


def _queued(held: AuditSocket, holders: Mapping[int, list[str]]) -> Queued:
    more = bool(held.flags & AuditFlag.MORE)
    return Queued(
        *(
            held.local,
            held.remote,
            held.state_name,
            held.netns,
            held.spliced,
            more,
            unread_from_stack(held),
        ),
        holders.get(held.inode, []),
    )


def _holders(inodes: set[int]) -> dict[int, list[str]]:
    found = find_holders(inodes - {0})
    return {inode: sorted({str(each) for each in holders}) for inode, holders in found.items()}
