"""The agent's looks at whether connections of this node are harmed: events, log lines, counters."""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator

from sockhop.agent.events import Event, EventKind
from sockhop.agent.state import WatchState
from sockhop.diagnose.causes import Cause
from sockhop.diagnose.watch import Changes, Watch
from sockhop.errors import SockhopError

__all__ = ["Watching", "change_events"]

_LOG = logging.getLogger(__name__)


class Watching:
    """Looks every `every` seconds in a thread of its own, and records what changes."""

    def __init__(self, append: Callable[[Iterable[Event]], None], every: float) -> None:
        """*append* writes events; that it fails must be its own affair."""
        self.state = WatchState(every)
        self.totals: Counter[Cause] = Counter()
        """Findings since this process began."""
        self._append = append

    async def run(self) -> None:
        """Look until cancelled. Where the kernel does not let us, that is logged and shown."""
        with Watch() as watch:
            while True:
                await asyncio.sleep(self.state.every)
                try:
                    changes, self.state.seconds = await asyncio.to_thread(_timed, watch)
                    self.state.findings = list(watch.findings.values())
                    self._record(changes)
                    self.state.reason = ""
                except (SockhopError, OSError) as error:
                    if str(error) != self.state.reason:
                        _LOG.warning("cannot look whether connections are harmed: %s", error)
                    self.state.reason = str(error)

    def _record(self, changes: Changes) -> None:
        self.totals.update(each.cause for each in changes.begun)
        for each in changes.begun:
            _LOG.warning("%s: %s; %s", each.cause, each.because, each.advice)
        for each in changes.over:
            _LOG.info("over: %s: %s", each.cause, each.because)
        self._append(change_events(changes))


def _timed(watch: Watch) -> tuple[Changes, float]:
    begin = time.thread_time()
    return watch.look(), time.thread_time() - begin


def change_events(changes: Changes) -> Iterator[Event]:
    """Yield what `sockhop events` tells of findings: which begin, which are over."""
    for kind, findings in ((EventKind.FOUND, changes.begun), (EventKind.OVER, changes.over)):
        for each in findings:
            advice = f"; {each.advice}" if kind is EventKind.FOUND else ""
            yield Event(
                time=time.time(),
                kind=kind,
                reason=f"{each.cause}: {each.because}{advice}",
                protocol="TCP" if each.remote else "",
                local=each.local if each.remote else "",
                remote=each.remote,
                netns=each.netns,
                processes=each.processes,
            )
