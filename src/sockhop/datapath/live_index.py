"""Keeps the index of live sockets, the map `live`, right and from filling up."""

import time
from collections import Counter
from collections.abc import Set

from sockhop.datapath.balancer import BalanceMaps
from sockhop.datapath.records import COUNTED_LIVE, LiveKey, Setting, Total
from sockhop.datapath.sockets import Pair, Sockets
from sockhop.kernel.syscall import grace_period

__all__ = ["LiveIndex"]

_CERTAIN_AFTER = 1_000_000_000
"""ns; as in sockets.bpf.c: a connect() that a hook has seen is through by then."""

_LOOKS = 3
"""A socket that is just being closed may look as if it was not counted, but hardly so often."""


class LiveIndex:
    """What is to be done for the index every now and then."""

    def __init__(self, maps: BalanceMaps, sockets: Sockets) -> None:
        self._maps = maps
        self._sockets = sockets
        self._idle: set[LiveKey] = set()
        """The counts that were 0 the last time."""

    def settle(self, backends: Set[int]) -> None:
        """Correct the counts, and delete counts of 0 that are of no use.

        Those of backends that are not in *backends* (ids): no hook can choose them any more. Each
        network namespace that comes and goes leaves others, so where more than half of the map is
        full, those that were 0 the last time go, too.

        An index that lacked room once is noted as whole again when it has all sockets.
        """
        self._sockets.settle()
        live = self._maps.live
        counts: list[tuple[LiveKey, int]] = live.items()
        idle = {key for key, count in counts if not count}
        live.delete_many(key for key in idle if key.backend not in backends)
        # Nobody can look through what is kept by cookie, where a socket's storage was refused.
        if not self._maps.setting(Setting.FALLBACK):
            if len(counts) > live.max_entries // 2:
                self._forget(idle & self._idle)
            if not self._maps.index_is_whole():
                self._look_again()
        self._idle = idle

    def _forget(self, idle: Set[LiveKey]) -> None:
        """Delete counts that hooks may still add to.

        A hook that has found its entry before adds to what is gone; by the end of a grace period it
        has marked its socket as counted.
        """
        self._maps.live.delete_many(idle)
        grace_period()
        if self._maps.index_is_whole() and not any(self._is_whole() for _ in range(_LOOKS)):
            full = self._maps.totals.get(Total.LIVE_FULL) or 0
            self._maps.totals.set(Total.LIVE_FULL, full + 1)

    def _look_again(self) -> None:
        full = self._maps.totals.get(Total.LIVE_FULL) or 0
        grace_period()  # whom a hook could not count, that is remembered by now
        if self._is_whole():
            self._maps.settings.set(Setting.WHOLE, full)

    def _is_whole(self) -> bool:
        """Whether all sockets that are remembered are counted where they are."""
        truth: Counter[LiveKey] = Counter()
        certain = time.clock_gettime_ns(time.CLOCK_BOOTTIME) - _CERTAIN_AFTER
        for each in self._sockets.remembered():
            origin = each.origin
            if origin is None:
                continue
            now = Pair(origin.service, origin.backend)
            before = Pair(origin.previous_service, origin.previous_backend)
            for pair, counted in ((now, origin.counted), (before, origin.previous_counted)):
                on_its_way = pair == now and origin.since > certain
                if counted & COUNTED_LIVE:
                    truth[LiveKey(origin.netns, *pair)] += 1
                elif each.is_open and (on_its_way or each.pair == pair):
                    return False
        counts = dict(self._maps.live.items())
        return all(counts.get(key, 0) >= number for key, number in truth.items())
