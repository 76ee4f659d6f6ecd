"""Carries out orders when they are due: ends sockets, moves them, probes their peers."""

import logging
import math
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple, TypeAlias

from sockhop.agent.concerns import live_sockets
from sockhop.agent.drain import Drain
from sockhop.agent.events import Event, EventKind
from sockhop.agent.installer import Installer
from sockhop.agent.orders import Order, Orders, Standing, now
from sockhop.agent.record import Cause, Recorder
from sockhop.agent.target import Member, split_service_port
from sockhop.datapath.balancer import BalanceMaps
from sockhop.datapath.candidates import active_backends
from sockhop.datapath.ending import Engine, Outcome
from sockhop.datapath.progress import probe_peers
from sockhop.datapath.records import FrontendKey, Setting
from sockhop.datapath.resteer import Obstacle
from sockhop.datapath.sockets import Pair, Socket, Sockets
from sockhop.errors import SockhopError
from sockhop.kernel.cgroups import cgroups_above
from sockhop.model import IntentKind, Protocol, Trigger

__all__ = ["SLOW", "Carrier", "Reach"]

_LOG = logging.getLogger(__name__)

_DELAYS = (0.1, 1.1, 5.0)
"""Seconds until an order that was carried out is looked at again: a connect that was under way
when its backend left is through a moment later, and lists miss sockets under churn."""

SLOW = 30.0
"""Seconds between further looks, and after a failure of the kernel."""

_PROTOCOLS = {protocol.number: protocol for protocol in Protocol}
_Causes: TypeAlias = Mapping[Pair, Cause]
_Dialled: TypeAlias = tuple[FrontendKey, int, int]
"""With the cookie of the network namespace and the id of the cgroup of who dialled."""

Mover = Callable[[Sequence[Socket]], Iterable[Outcome]]
"""Points connected UDP sockets at another backend."""


class _Work:
    """How far an order is. `next`: when to look at it again; `over`: when its last sockets end."""

    def __init__(self, order: Order) -> None:
        self.order, self.since = order, order.since
        self.tries = 0
        self.parked = 0
        self.drain: Drain | None = None
        self.next = self.over = order.since
        intent = order.intent
        if intent.kind is IntentKind.RESTEER:
            self.over = math.inf
        elif intent.kind is IntentKind.DRAIN and order.protocol is Protocol.TCP:
            self.drain = Drain(intent, order.since, now())
            self.over = math.inf if intent.deadline is None else order.since + intent.deadline
        elif intent.kind is IntentKind.DRAIN:
            # Datagrams are not acknowledged: nobody can tell whether a UDP socket makes progress.
            self.over = order.since + intent.after
            self.next = self.over

    def is_about(self, order: Order) -> bool:
        """Whether it is still the same order, and its time began when it did."""
        return self.order is order and self.since == order.since

    def drained(self, drain: Drain) -> None:
        """Set `next` after a look at sockets that drain."""
        self.next = min(drain.next, self.over)
        self.tries += 1

    def again(self, at: float) -> None:
        """Set `next` after everything was done that could be."""
        self.next = at + (_DELAYS[self.tries] if self.tries < len(_DELAYS) else SLOW)
        self.tries += 1


class Reach(NamedTuple):
    """What gets at live sockets."""

    maps: BalanceMaps
    sockets: Sockets
    engine: Engine
    move: Mover
    moves: Mapping[Obstacle, int]
    """How often that went well, or why it did not."""


class Carrier:
    """Looks at the orders that are due, and forgets those that no socket is left of."""

    def __init__(
        self,
        reach: Reach,
        installer: Installer,
        orders: Orders,
        recorder: Recorder,
    ) -> None:
        self._installer = installer
        self._orders = orders
        self._recorder = recorder
        self._maps, self._sockets, self._engine, self._move, self.moves = reach
        self._work: dict[Pair, _Work] = {}
        self._serving: set[Member] = set()

    @property
    def engine_name(self) -> str:
        """What ends sockets: iterator or netlink."""
        return self._engine.name

    @property
    def failures(self) -> dict[str, int]:
        """How often the kernel refused a way to end sockets, so that another was taken."""
        return dict(self._engine.failures)

    def changed(self) -> None:
        """Look at all orders anew: what is installed has changed."""
        # What leaves a service need not be asked about.
        names = {each.service for each in self._orders if each.trigger is not Trigger.REMOVED}
        entries = self._installer.installed.entries.items() if names else ()
        self._serving = {
            Member(old.entry.service, each.address, each.port, _PROTOCOLS[key.protocol])
            for key, old in entries
            if old.entry.service in names
            for each in old.entry.backends
        }
        for work in self._work.values():
            if work.parked or work.order.trigger is not Trigger.REMOVED:
                work.next = min(work.next, now())
        returned = [each for each in self._orders if each.standing is Standing.RETURNED]
        live = self._live() if returned else {}
        for order in returned:
            if not live.get(order.pair):
                self._orders.drop(order.pair)

    def parked(self) -> int:
        """Return how many UDP sockets wait for a backend that they could go to."""
        return sum(self._work[order.pair].parked for order in self._due_ever())

    def draining(self) -> int:
        """Return how many sockets a drain is about, never too few."""
        pairs = {o.pair for o in self._due_ever() if o.intent.kind is IntentKind.DRAIN}
        live = self._live() if pairs else {}
        return sum(live.get(pair, 0) for pair in pairs)

    def run(self) -> float:
        """Carry out what is due; return when to come again, in the time of now()."""
        at = now()
        due = [order for order in self._due_ever() if self._work[order.pair].next <= at]
        try:
            if due:
                self._carry_out(due, at)
        except SockhopError as error:
            _LOG.error("live sockets are as they were, another try follows: %s", error)
            for work in [self._work[each.pair] for each in due if each.pair in self._work]:
                work.next = at + SLOW
        self._orders.save()
        return min((self._work[order.pair].next for order in self._due_ever()), default=math.inf)

    def _carry_out(self, due: Sequence[Order], at: float) -> None:
        """Do what is due with the sockets of these orders."""
        works = {order.pair: self._work[order.pair] for order in due}
        if any(work.tries for work in works.values()):
            due = self._unfinished(due)
        causes = {order.pair: _cause(order) for order in due}
        sever, move, drain = _sorted(due, works, at)
        # Each is put on record at once: what comes next may fail.
        if sever:
            outcomes = self._engine.sever_pairs({order.pair for order in sever})
            self._recorder.record(_with_causes(outcomes, causes))
        for order in sever:
            works[order.pair].again(at)
        sockets = self._open_sockets([*move, *drain])
        for order in move:
            works[order.pair].again(at)
        self._recorder.record(self._moved(move, sockets, causes))
        self._recorder.record(self._drained(drain, sockets, causes, at))

    def _moved(
        self, orders: Sequence[Order], sockets: Mapping[Pair, Sequence[Socket]], causes: _Causes
    ) -> Iterator[tuple[Outcome, Cause]]:
        ready: list[Socket] = []
        there: dict[_Dialled, bool] = {}
        for order in orders:
            mine = sockets.get(order.pair, ())
            able = [each for each in mine if self._has_backend(each, there)]
            self._park(order, len(mine) - len(able))
            ready += able
        yield from _with_causes(self._move(ready) if ready else (), causes)

    def _drained(
        self,
        orders: Sequence[Order],
        sockets: Mapping[Pair, Sequence[Socket]],
        causes: _Causes,
        at: float,
    ) -> Iterator[tuple[Outcome, Cause]]:
        end: list[Socket] = []
        probe: dict[Pair, Sequence[Socket]] = {}
        for order in orders:
            work = self._work[order.pair]
            if work.drain is None:
                continue
            verdict = work.drain.look(sockets.get(order.pair, ()), at)
            work.drained(work.drain)
            end += verdict.end
            if verdict.probe:
                probe[order.pair] = verdict.probe
        reached = probe_peers(each for some in probe.values() for each in some) if probe else set()
        for pair, some in probe.items():
            if drain := self._work[pair].drain:
                drain.reached({each.cookie for each in some} & reached)
        yield from _with_causes(self._engine.sever_sockets(end) if end else (), causes)

    def _unfinished(self, orders: Sequence[Order]) -> list[Order]:
        """Return those of which sockets are left; forget the others, if they get no more."""
        self._sockets.settle()
        left: Mapping[Pair, int | Sequence[Socket]] = self._live()
        if not self._maps.index_is_whole():
            left = self._open_sockets(orders)
        for order in orders:
            if left.get(order.pair):
                continue
            if order.trigger is Trigger.REMOVED:
                self._orders.drop(order.pair)
                del self._work[order.pair]
            else:  # it may get sockets as long as it is there, where nothing better is
                self._work[order.pair].again(now())
        return [order for order in orders if left.get(order.pair)]

    def _open_sockets(self, orders: Sequence[Order]) -> Mapping[Pair, Sequence[Socket]]:
        found: defaultdict[Pair, list[Socket]] = defaultdict(list)
        for each in self._sockets.of_pairs([order.pair for order in orders]) if orders else ():
            if each.pair and not each.reason_to_leave:
                found[each.pair].append(each)
        return found

    def _has_backend(self, each: Socket, known: dict[_Dialled, bool]) -> bool:
        """Whether what a socket dialled has an active backend, so that it could go there.

        That may be a redirect's by now. *known* keeps what has been looked up.
        """
        origin = each.origin
        if origin is None or self._maps.setting(Setting.BYPASS):
            return False
        end = FrontendKey(origin.frontend_address, 0, origin.frontend_port, origin.protocol)
        dialled = end, origin.netns, each.cgroup
        if dialled not in known:
            found = self._maps.find_for(end, origin.netns, cgroups_above(each.cgroup))
            known[dialled] = bool(found and active_backends(self._maps, found[1]))
        return known[dialled]

    def _park(self, order: Order, count: int) -> None:
        """Note that sockets wait for a backend; the first time it is an event."""
        work = self._work[order.pair]
        if count and not work.parked:
            self._recorder.append(
                [
                    Event(
                        time.time(),
                        EventKind.PARKED,
                        f"{order.reason}, and no other backend is active",
                        order.change,
                        split_service_port(order.service)[0],
                        str(order.intent),
                        sockets=count,
                    )
                ]
            )
        work.parked = count

    def _live(self) -> Counter[Pair]:
        sockets, _ = live_sockets(self._maps.live.items())
        return sockets

    def _due_ever(self) -> Iterator[Order]:
        """Yield the orders that may be carried out, each with its work."""
        for order in self._orders:
            if order.standing is not Standing.DUE:
                self._work.pop(order.pair, None)
                continue
            # While nothing better is there, new connections go to a backend in any state: those
            # that it has are as good.
            if order.trigger is not Trigger.REMOVED and order.member in self._serving:
                continue
            work = self._work.get(order.pair)
            if work is None or not work.is_about(order):
                self._work[order.pair] = _Work(order)
            yield order


def _sorted(
    orders: Iterable[Order], works: Mapping[Pair, _Work], at: float
) -> tuple[list[Order], list[Order], list[Order]]:
    """Return the orders whose sockets end now, move now, or are looked at."""
    sever: list[Order] = []
    move: list[Order] = []
    drain: list[Order] = []
    for order in orders:
        if order.intent.kind is IntentKind.RESTEER:
            move.append(order)
        elif order.intent.kind is IntentKind.SEVER or at >= works[order.pair].over:
            sever.append(order)
        else:
            drain.append(order)
    return sever, move, drain


def _with_causes(outcomes: Iterable[Outcome], causes: _Causes) -> Iterator[tuple[Outcome, Cause]]:
    """Yield each outcome with why; it goes on record even if no order is known for it."""
    for each in outcomes:
        pair = each.socket.pair
        yield each, (causes.get(pair) if pair else None) or _UNKNOWN


_UNKNOWN = Cause("unknown", "no order asked for that")


def _cause(order: Order) -> Cause:
    intent = str(order.intent)
    return Cause(order.trigger, order.reason, order.service, intent, order.change)
