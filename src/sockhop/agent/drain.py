"""Which sockets of a draining backend still make progress, and which should end."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from sockhop.datapath.progress import Progress, progress_of
from sockhop.datapath.sockets import Socket
from sockhop.model import Intent

__all__ = ["Drain", "Verdict"]

_WINDOW_LEAST, _WINDOW_MOST = 2.0, 4.0
"""Seconds for an answer to keepalive probes: as many as the drain takes, within these. A socket can
be probed when it has been idle for a second (datapath/progress.py)."""

ROUNDS = 3
"""Probes in that time: one may be lost."""

_AGAIN_LEAST, _AGAIN_MOST = 5.0, 30.0
"""Seconds between two looks at sockets that went on: at least, at most, else the drain's own."""


class Verdict(NamedTuple):
    """What to do now: sockets to end, and sockets whose peers are to be probed."""

    end: Sequence[Socket]
    probe: Sequence[Socket]


class Drain:
    """Looks at the TCP connections to one backend again and again.

    A connection makes progress if anything came from its peer: data, an ACK of sent data, an answer
    to a keepalive probe. One whose data was not acknowledged cannot be probed, and is given the
    whole time of the drain. One that no probe can reach is left: the deadline ends it.
    Times are those of :func:`sockhop.agent.orders.now`.
    """

    def __init__(self, intent: Intent, since: float, at: float) -> None:
        """*since*: when the drain began; *at*: now, later if the agent was started in between."""
        self._again = min(max(intent.after, _AGAIN_LEAST), _AGAIN_MOST)
        self._window = min(max(intent.after, _WINDOW_LEAST), _WINDOW_MOST)
        self._judge_at = max(since + intent.after, at + self._window)
        self._patience = 0.9 * intent.after  # looks come a little late
        self._probing_since: float | None = None
        self._reached: set[int] = set()
        self._seen: dict[int, tuple[Progress, float]] = {}
        self.next = at
        """When to look again."""

    def reached(self, cookies: Iterable[int]) -> None:
        """Note whose peers were probed."""
        self._reached.update(cookies)

    def look(self, sockets: Sequence[Socket], at: float) -> Verdict:
        """Say what to do with *sockets*, all that are with the backend now; sets `next`."""
        self._note(sockets, at)
        probing = self._judge_at - self._window
        if at < probing:
            self.next = probing
            return Verdict((), ())
        if at < self._judge_at:
            if self._probing_since is None:
                self._probing_since = at
            self.next = min(at + self._window / ROUNDS, self._judge_at)
            silent = (each for each in sockets if self._is_silent(each))
            return Verdict((), [each for each in silent if not each.waiting])
        end = [each for each in sockets if self._is_silent(each) and self._should_end(each, at)]
        self._probing_since, self._reached = None, set()
        self._judge_at = at + self._again
        self.next = self._judge_at - self._window
        return Verdict(end, ())

    def _note(self, sockets: Iterable[Socket], at: float) -> None:
        before, self._seen = self._seen, {}
        for each in sockets:
            progress, known = progress_of(each), before.get(each.cookie)
            unmoved = known is not None and known[0] == progress
            self._seen[each.cookie] = known if unmoved and known else (progress, at)

    def _is_silent(self, each: Socket) -> bool:
        """Whether nothing came since the first probe; a socket that was not there then is new."""
        since = self._probing_since
        return since is not None and self._seen[each.cookie][1] <= since

    def _should_end(self, each: Socket, at: float) -> bool:
        if each.waiting:
            return at - self._seen[each.cookie][1] >= self._patience
        return each.cookie in self._reached
