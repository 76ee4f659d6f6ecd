"""Records what the kernel does for the connections of an address, and compares good with bad."""

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import NamedTuple

import msgspec

from sockhop.datapath.tracing import Means, Tracer, TraceRecord
from sockhop.diagnose.callpaths import (
    Connection,
    Difference,
    Moment,
    Side,
    Step,
    Verdict,
    compare,
    connections,
    life,
    merged,
)
from sockhop.errors import SockhopError
from sockhop.kernel.symbols import Symbols
from sockhop.model import endpoint, unpack_address

__all__ = ["Line", "Program", "Trace", "Traced", "trace"]

_POLL = 0.02
_LAST = 0.2
"""So long are those that were dialled watched after their end, in seconds."""


class Line(msgspec.Struct, frozen=True):
    """A function in the tree of paths: "-" if only the answered connection has it there, "+" if
    only the other, else " "."""

    mark: str
    depth: int
    step: Step


class Traced(msgspec.Struct, frozen=True):
    """A connection: who called for which end, and the life of their handlers."""

    connection: str
    verdict: Verdict
    records: int
    processes: dict[Side, list[str]]
    life: dict[Side, list[Moment]]


class Trace(msgspec.Struct, frozen=True):
    """What a trace found.

    `functions`: what was traced; `reason`: why only tracepoints were; `verdicts`: how many
    connections ended how; `truncated`: it ended early, because there were enough records.
    `answered`, `unanswered`: those that are compared, None if there was none such.
    """

    target: str
    means: Means
    reason: str
    functions: list[str]
    seconds: float
    records: int
    lost: int
    truncated: bool
    verdicts: dict[Verdict, int]
    answered: Traced | None
    unanswered: Traced | None
    difference: Difference | None
    paths: dict[Side, list[Line]]


class Program(NamedTuple):
    """Whose connections are meant: those of a process, and of programs of a name; None: of all."""

    pid: int | None = None
    command: str | None = None


def trace(
    target: tuple[bytes, int],
    *,
    seconds: float,
    most: int,
    dial: Callable[[], None] | None = None,
    begun: Callable[[], None] = lambda: None,
    of: Program = Program(),  # noqa: B008 (it is immutable)
) -> Trace:
    """Trace the TCP connections of *target*, a packed address and a port.

    It ends after *seconds*, after *most* records, at SIGINT, or, given *dial*, which makes
    connections, soon after that returns. *begun* is called when tracing has begun. Only connections
    count of which an end is *of* that program. SystemLackError where the kernel lets nobody trace.
    """
    Symbols()  # where they are hidden, nobody has to wait to hear of it
    records: list[TraceRecord] = []
    with Tracer(target) as tracer:
        means, functions = tracer.start()
        begin = time.monotonic()
        with suppress(KeyboardInterrupt):
            begun()
            with _running(dial) as is_done:
                for some in _fetched(tracer, begin + seconds, is_done):
                    records += some
                    if len(records) >= most:
                        break
        elapsed = round(time.monotonic() - begin, 3)
        lost, reason = tracer.lost(), tracer.reason
        symbols = Symbols()  # while our own programs, which are on the stacks, are loaded
    truncated = len(records) >= most
    del records[most:]
    found = [
        each
        for each in connections(records, target)
        if any(end.is_of(*of) for end in each.ends.values())
    ]
    verdicts = Counter(each.verdict for each in found)
    good, bad = _first(found, Verdict.ANSWERED), _first(found, Verdict.UNANSWERED)
    return Trace(
        endpoint(unpack_address(target[0]), target[1]),
        *(means, reason, functions, elapsed, len(records), lost, truncated),
        {verdict: verdicts[verdict] for verdict in Verdict if verdict in verdicts},
        _traced(good, symbols),
        _traced(bad, symbols),
        compare(good, bad, symbols) if good and bad else None,
        _paths(good, bad, symbols),
    )


@contextmanager
def _running(dial: Callable[[], None] | None) -> Iterator[Callable[[], bool]]:
    """Run *dial* in a thread during the body, which is given whether it is done."""
    if dial is None:
        yield lambda: False
        return
    errors: list[Exception] = []

    def run() -> None:
        try:
            dial()
        except (OSError, SockhopError) as error:  # for the caller
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield lambda: not thread.is_alive()
    finally:
        thread.join()
    if errors:
        raise errors[0]


def _fetched(
    tracer: Tracer, until: float, is_done: Callable[[], bool]
) -> Iterator[list[TraceRecord]]:
    """Yield records until that time, or until shortly after it is done."""
    ends = False
    while not ends:
        done = is_done()
        time.sleep(_LAST if done else _POLL)
        ends = done or time.monotonic() >= until
        yield tracer.records()


def _paths(
    good: Connection | None, bad: Connection | None, symbols: Symbols
) -> dict[Side, list[Line]]:
    found = {}
    for side in Side:
        ours, theirs = (each.ends.get(side) if each else None for each in (good, bad))
        if ours or theirs:
            found[side] = [Line(*line) for line in merged(ours, theirs, symbols)]
    return found


def _first(found: Sequence[Connection], wanted: Verdict) -> Connection | None:
    """Return the first such connection, better one with both its ends."""
    those = [each for each in found if each.verdict is wanted]
    return max(those, key=lambda each: len(each.ends), default=None)


def _traced(of: Connection | None, symbols: Symbols) -> Traced | None:
    if of is None:
        return None
    return Traced(
        of.name,
        of.verdict,
        sum(len(each.records) for each in of.ends.values()),
        {side: of.ends[side].processes for side in Side if side in of.ends},
        {side: life(of, side, symbols) for side in Side if side in of.ends},
    )
