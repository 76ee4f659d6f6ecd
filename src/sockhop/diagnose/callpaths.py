"""What the kernel did for connections: call paths, the life of their handlers, and comparisons."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

import msgspec

from sockhop.datapath.sockets import TCP_STATES
from sockhop.datapath.traced_functions import FUNCTIONS, file_of
from sockhop.datapath.tracing import TraceKind, TraceRecord
from sockhop.kernel.procfs import command_name
from sockhop.kernel.symbols import Symbols
from sockhop.model import endpoint, unpack_address

__all__ = [
    "Connection", "Difference", "End", "Moment", "Side", "Step", "Verdict", "compare",
    "connections", "life", "merged",
]  # fmt: skip

Path = tuple[str, ...]

# A path begins where a system call enters the socket layer.
_ROOTS = (
    "sock_recvmsg", "sock_sendmsg", "__sock_sendmsg", "sock_read_iter", "sock_write_iter",
)  # fmt: skip
# What runs when a segment arrives is not called by the program that it is for; it runs whenever.
_ARRIVALS = frozenset((
    "__do_softirq", "handle_softirqs", "do_softirq", "__local_bh_enable_ip", "net_rx_action",
    "tcp_v4_rcv", "tcp_v6_rcv", "tcp_v4_do_rcv", "tcp_v6_do_rcv", "release_sock", "__release_sock",
))  # fmt: skip
# The tracepoint's own frames.
_TRACEPOINT = ("bpf_trace_run", "__bpf_trace_", "__traceiter_", "call_trace_", "bpf_prog_")
_TRANSFERS = frozenset(each.name for each in FUNCTIONS.values() if each.result)
_CALLERS = 7
_ESTABLISHED = TCP_STATES.index("ESTAB") + 1
_BEGIN = (TraceKind.STATE, _ESTABLISHED)


class Verdict(StrEnum):
    """What became of the request on a connection."""

    ANSWERED = "answered"
    UNANSWERED = "not answered"
    IDLE = "nothing sent"


class Side(StrEnum):
    """Which end: that with the address that is looked for is the server's."""

    SERVER = "server"
    CLIENT = "client"


@dataclass(frozen=True)
class End:
    """A socket, with its records in order."""

    side: Side
    local: str
    remote: str
    sock: int
    records: list[TraceRecord] = field(default_factory=list)

    def moved(self, kind: TraceKind) -> int:
        """Return how many bytes its program has sent or received."""
        return sum(max(0, each.value) for each in self.records if each.kind == kind)

    @property
    def processes(self) -> list[str]:
        """The programs that have called something for it: command/pid."""
        calls = [each for each in self.records if each.kind in (TraceKind.RECEIVED, TraceKind.SENT)]
        return sorted({f"{command_name(each.command)}/{each.pid}" for each in calls})

    def is_of(self, pid: int | None, command: str | None) -> bool:
        """Whether this process, and a program of this name, has called something for it."""
        return any(
            pid in (None, each.pid) and command in (None, command_name(each.command))
            for each in self.records
            if each.kind not in (TraceKind.STATE, TraceKind.END)
        )


@dataclass(frozen=True)
class Connection:
    """A connection with those of its ends that are on this node and were seen."""

    ends: dict[Side, End]

    @property
    def verdict(self) -> Verdict:
        """A request counts as answered if its sender has received something."""
        asker, wanted = self.ends.get(Side.CLIENT), TraceKind.RECEIVED
        begins = TraceKind.SENT
        if asker is None:
            asker, wanted, begins = self.ends[Side.SERVER], TraceKind.SENT, TraceKind.RECEIVED
        if not asker.moved(begins):
            return Verdict.IDLE
        return Verdict.ANSWERED if asker.moved(wanted) else Verdict.UNANSWERED

    @property
    def begun(self) -> int:
        """When it was first seen, in ns (CLOCK_MONOTONIC)."""
        return min(each.records[0].time for each in self.ends.values())

    @property
    def name(self) -> str:
        """CLIENT > SERVER."""
        client = self.ends.get(Side.CLIENT)
        if client:
            return f"{client.local} > {client.remote}"
        return f"{self.ends[Side.SERVER].remote} > {self.ends[Side.SERVER].local}"


class Step(msgspec.Struct, frozen=True):
    """A function, and the kernel's source file that defines it, "" where that is not known."""

    function: str
    file: str


class Difference(msgspec.Struct, frozen=True):
    """Where two call paths part: the functions on the way there, and what each calls next.

    If the bad one calls nothing else, `bad` is empty, and `good` what it never came to. Unless
    `called`, nothing was called that differs, but what recv() would have called does.
    """

    side: Side
    path: list[Step]
    good: list[Step]
    bad: list[Step]
    called: bool = True


class Moment(msgspec.Struct, frozen=True):
    """An event in the life of a socket's handlers.

    `seconds` after the connection was first seen; `receiver`: what its recv() would call when the
    event began; `callers`: the innermost first.
    """

    seconds: float
    event: str
    receiver: str
    callers: list[str]


def connections(records: Iterable[TraceRecord], target: tuple[bytes, int]) -> list[Connection]:
    """Return the connections that *records* tell of, the oldest first."""
    open_ends: dict[object, End] = {}
    ends: list[End] = []
    for each in records:
        if not each.local_port or not each.remote_port or not any(each.remote_address[12:]):
            continue  # not bound or not connected yet
        key = (each.sock, *each[:2], each.local_port, each.remote_port)
        end = open_ends.get(key)
        if end is None:
            is_server = (each.local_address, each.local_port) == target
            end = open_ends[key] = End(
                Side.SERVER if is_server else Side.CLIENT,
                endpoint(unpack_address(each.local_address), each.local_port),
                endpoint(unpack_address(each.remote_address), each.remote_port),
                each.sock,
            )
            ends.append(end)
        end.records.append(each)
        if each.kind == TraceKind.END:
            del open_ends[key]  # its memory may become another's
    return sorted(_paired(ends), key=lambda each: each.begun)


def _paired(ends: Sequence[End]) -> Iterator[Connection]:
    """Put ends together; where the same addresses are in use again, those that began together."""
    servers: dict[tuple[str, str], list[End]] = {}
    for each in ends:
        if each.side is Side.SERVER:
            servers.setdefault((each.remote, each.local), []).append(each)
    for each in ends:
        if each.side is Side.CLIENT:
            others = servers.get((each.local, each.remote), [])
            if others:
                begun = each.records[0].time
                other = min(others, key=lambda end: abs(end.records[0].time - begun))
                others.remove(other)
                yield Connection({Side.CLIENT: each, Side.SERVER: other})
            else:
                yield Connection({Side.CLIENT: each})
    for left in servers.values():
        yield from (Connection({Side.SERVER: each}) for each in left)


def paths(end: End, symbols: Symbols) -> list[Path]:
    """Return what programs' system calls ran for a socket, each path once, in order.

    Of a tracepoint behind recv(), the last function is the handler that the socket has there.
    """
    found: dict[Path, None] = {}
    inside: dict[int, Path] = {}  # by thread: the recv() or send() that has not returned
    for each in end.records:
        if each.kind in (TraceKind.RECEIVED, TraceKind.SENT) and each.at:
            inside.pop(each.thread, None)
        path = _path(each, symbols)
        if not path:
            continue
        if each.thread in inside:
            path = _under(inside[each.thread], path)
        elif each.at and path[-1] in _TRANSFERS:
            inside[each.thread] = path
        if each.state != _ESTABLISHED:
            # Spliced sockets hear of the end from the stack, if it is there before they ask.
            spliced = (n for n, name in enumerate(path) if name.startswith("tcp_bpf_recvmsg"))
            path = path[: next(spliced, len(path)) + 1]
        found.setdefault(path)
    return list(found)


def _path(record: TraceRecord, symbols: Symbols) -> Path:
    """Return the functions from a system call's way into the socket layer on; () if there is none.

    A function whose last act is to call another, as inet_recvmsg in 7.3 and tcp_bpf_recvmsg, is not
    on the stack of that: so what a spliced socket calls is put behind its handler here.
    """
    names = _frames(record, symbols)
    if record.kind == TraceKind.RECEIVED and not record.at:
        names.insert(0, symbols.name(record.receiver))
    elif record.kind not in (TraceKind.CALL, TraceKind.READY):
        return ()
    if not _ARRIVALS.isdisjoint(names):
        return ()
    roots = [n for n, name in enumerate(names) if name in FUNCTIONS or name in _ROOTS]
    path = tuple(reversed(names[: roots[-1] + 1])) if roots else ()
    handler = symbols.name(record.receiver)
    if "tcp_recvmsg" in path and handler.startswith("tcp_bpf_recvmsg") and handler not in path:
        n = path.index("tcp_recvmsg")
        path = (*path[:n], handler, *path[n:])
    return path


def _under(caller: Path, path: Path) -> Path:
    """Return *path* as called by *caller*, which has not returned, on the stack or not."""
    if caller[-1] in path:
        return caller + path[path.index(caller[-1]) + 1 :]
    ways = zip(caller[:-1], path, strict=False)
    same = next((n for n, (one, other) in enumerate(ways) if one != other), None)
    return caller + path[min(len(caller) - 1, len(path)) if same is None else same :]


def _frames(record: TraceRecord, symbols: Symbols) -> list[str]:
    """Return the function that was called and its callers, the innermost first."""
    names = [symbols.name(address) for address in record.frames]
    while names and names[0].startswith(_TRACEPOINT):
        del names[0]
    if record.at and (called := symbols.name(record.at)) not in names[:1]:
        names.insert(0, called)
    return names


def compare(good: Connection, bad: Connection, symbols: Symbols) -> Difference | None:
    """Return where the call paths of *bad* first leave those of *good*; None if they do not.

    First means: first in time of what only *bad* does; else the handlers with which a connection
    began; else the first of what *bad* never comes to. The server's end counts before the client's,
    which waits for it.
    """
    both = [side for side in Side if side in good.ends and side in bad.ends]
    found = [(side, paths(good.ends[side], symbols), paths(bad.ends[side], symbols))
             for side in both]  # fmt: skip
    for side, ours, theirs in found:
        if (parting := _parting(theirs, ours)) is not None:
            path, function = parting
            instead = [each for each in _next(ours, path) if each not in _next(theirs, path)]
            return Difference(side, _steps(path), _steps(instead), _steps([function]))
    for side in both:
        ready, not_ready = (_first_receiver(each.ends[side], symbols) for each in (good, bad))
        if ready and not_ready and ready != not_ready:
            return Difference(side, [], _steps([ready]), _steps([not_ready]), called=False)
    for side, ours, theirs in found:
        if (parting := _parting(ours, theirs)) is not None:
            path, function = parting
            return Difference(side, _steps(path), _steps([function]), [])
    return None


def _first_receiver(end: End, symbols: Symbols) -> str:
    """Return what a socket's recv() called when the connection was established, "" if not seen.

    A client's handlers are only decided after its state has changed.
    """
    steady = (TraceKind.RECEIVED, TraceKind.SENT, TraceKind.READY)
    for each in end.records:
        begins = end.side is Side.SERVER and (each.kind, each.value) == _BEGIN
        if begins or (each.kind in steady and each.state == _ESTABLISHED):
            return symbols.name(each.receiver)
    return ""


def _parting(one: Sequence[Path], other: Sequence[Path]) -> tuple[Path, str] | None:
    """Return the first function of *one* that *other* does not call there, and the way there."""
    known = {path[:n] for path in other for n in range(1, len(path) + 1)}
    for path in one:
        for n in range(1, len(path) + 1):
            if path[:n] not in known:
                return path[: n - 1], path[n - 1]
    return None


def _next(of: Sequence[Path], path: Path) -> list[str]:
    n = len(path)
    return list(dict.fromkeys(each[n] for each in of if len(each) > n and each[:n] == path))


def _steps(names: Iterable[str]) -> list[Step]:
    return [Step(name, file_of(name)) for name in names]


def merged(good: End | None, bad: End | None, symbols: Symbols) -> list[tuple[str, int, Step]]:
    """Return both ends' paths as one tree: a mark, the depth and the function of each line.

    The mark is "-" for what only *good* calls, "+" for what only *bad* does, else " ".
    """
    ours = paths(good, symbols) if good else []
    theirs = paths(bad, symbols) if bad else []
    return list(_tree(ours, theirs, ()))


def _tree(
    ours: Sequence[Path], theirs: Sequence[Path], path: Path
) -> Iterator[tuple[str, int, Step]]:
    mine, others = _next(ours, path), _next(theirs, path)
    for name in dict.fromkeys((*mine, *others)):
        mark = " " if name in mine and name in others else "-" if name in mine else "+"
        yield mark, len(path), Step(name, file_of(name))
        yield from _tree(ours, theirs, (*path, name))


def life(of: Connection, side: Side, symbols: Symbols) -> list[Moment]:
    """Return what decided over a socket's handlers, with who called it; states, too."""
    end, moments = of.ends[side], []
    for each in end.records:
        names = _frames(each, symbols)
        if each.kind == TraceKind.STATE:
            event = f"state {_state(each.value)}"
        elif each.kind == TraceKind.END:
            event = "destroyed"
        elif each.kind == TraceKind.CALL and names[0] in FUNCTIONS and FUNCTIONS[names[0]].life:
            event, names = names[0], names[1:]
        else:
            continue
        receiver = symbols.name(each.receiver)
        seconds = (each.time - of.begun) / 1e9
        moments.append(Moment(seconds, event, receiver, names[:_CALLERS]))
    return moments


def _state(number: int) -> str:
    return TCP_STATES[number - 1] if 0 < number <= len(TCP_STATES) else str(number)
