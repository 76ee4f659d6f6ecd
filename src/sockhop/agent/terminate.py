"""Carries out intents: ends or moves, at the right time, the sockets that a change concerns.

A change is looked at before it is applied (:meth:`Terminator.prepare`), so that the orders that
follow from it are in their file before the maps forget what they are about; they count from when it
has been applied (:meth:`Terminator.begin`).
"""

import logging
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from sockhop.agent.brake import Limits, may_end
from sockhop.agent.carry_out import Carrier, Reach
from sockhop.agent.concerns import STATE_TRIGGERS, Concern, concerns, describe, live_sockets
from sockhop.agent.denials import Denials
from sockhop.agent.enforce import Enforcer
from sockhop.agent.events import Event, EventKind, EventLog, events_path
from sockhop.agent.forbidden import Looker
from sockhop.agent.installed import read_services
from sockhop.agent.installer import Installer
from sockhop.agent.orders import Order, Orders, Standing, now, orders_path
from sockhop.agent.plan import Plan
from sockhop.agent.policies import PolicyKeeper
from sockhop.agent.record import Recorder
from sockhop.agent.state import HeldChange, Termination
from sockhop.agent.target import Member, split_service_port
from sockhop.datapath.balancer import BalanceMaps
from sockhop.datapath.ending import Outcome, choose_engine
from sockhop.datapath.listing import Listing
from sockhop.datapath.records import Setting
from sockhop.datapath.resteer import Obstacle, Resteerer
from sockhop.datapath.sockets import Pair, Socket, Sockets
from sockhop.model import IntentKind, IntentRule, Service, Trigger, endpoint, intent_for

__all__ = ["Terminator", "opened_terminator"]

_LOG = logging.getLogger(__name__)


class _Prepared(NamedTuple):
    """What a change means, as found before it was applied, each with why it waits, or ""."""

    change: int
    found: Sequence[tuple[Concern, str]]
    sockets: Mapping[Pair, int]


class Terminator:
    """Turns changes into orders, and has them carried out."""

    def __init__(
        self,
        installer: Installer,
        orders: Orders,
        recorder: Recorder,
        *,
        limits: Limits,
        reach: Reach,
        enforcer: Enforcer,
    ) -> None:
        self._maps = maps = reach.maps
        self._installer = installer
        self._orders = orders
        self._recorder = recorder
        self._limits = limits
        self._carrier = Carrier(reach, installer, orders, recorder)
        self._enforcer = enforcer
        self._denials = Denials(reach, recorder, limits, lambda: read_services(maps), self._rules)
        self._services: Mapping[str, Service] = {}
        self.doubts: Callable[[], Mapping[str, str]] = dict
        """Returns why the checks of services are not to be believed, by service."""
        self._prepared: _Prepared | None = None

    # --- a change -----------------------------------------------------------------------------

    def prepare(self, plan: Plan, services: Mapping[str, Service]) -> None:
        """Note, before *plan* is applied, what it means for live sockets.

        *services*: all that there will be, by name. SystemLackError where that can't be kept.
        """
        self._services = services
        self._enforcer.note_redirects()
        installed = self._installer.installed
        found = list(concerns(plan, installed, self._rules))
        self._prepared = None
        if not found:
            self._orders.save()
            return
        found += self._earlier(found)
        sockets, _ = live_sockets(self._maps.live.items())
        everywhere = not self._maps.index_is_whole()
        live = [each for each in found if everywhere or sockets[each.pair]]
        pairs, held = {each.pair for each in live}, ""
        if any(each.intent.kind is not IntentKind.LEAVE for each in live):
            held = self._limits.reason_to_wait(plan, installed, may_end(live, sockets))
        doubted = self._doubted(found)
        change, at = self._maps.setting(Setting.GENERATION) + 1, now()
        for each in found:
            self._orders.drop(each.pair)
            # What is removed gets no more sockets; a backend in another state may, if it serves.
            if each.intent.kind is not IntentKind.LEAVE and (
                each.pair in pairs or each.trigger is not Trigger.REMOVED
            ):
                self._orders.add(_order(each, change, at, held or doubted.get(each.pair, "")))
        self._prepared = _Prepared(
            change, [(each, held or doubted.get(each.pair, "")) for each in live], sockets
        )
        self._orders.save()

    def _doubted(self, found: Iterable[Concern]) -> Mapping[Pair, str]:
        """Return what ends no socket, since the checks that ask for it may be wrong, and why."""
        ends = [
            each
            for each in found
            if each.trigger is Trigger.QUARANTINED
            and each.intent.kind in (IntentKind.SEVER, IntentKind.DRAIN)
        ]
        doubts = self.doubts() if ends and self._limits.brake else {}
        whys = {each.pair: doubts.get(split_service_port(each.member.service)[0]) for each in ends}
        return {pair: why for pair, why in whys.items() if why}

    def begin(self, *, applied: bool = True) -> None:
        """Let time run for what was prepared; without *applied* for what of it has happened."""
        prepared, self._prepared = self._prepared, None
        at = now()
        for order in self._orders:
            self._reconcile(order, at)
        self._orders.rules = {
            name: service.intents for name, service in self._services.items() if service.intents
        }
        self._carrier.changed()
        self._orders.save()
        if prepared is not None and applied:
            self._note(prepared)

    def run(self) -> float:
        """Carry out what is due; return when to come again, in the time of now()."""
        looks = self._enforcer.run(self.deny, self._recorder)
        return min(looks, self._denials.run(), self._carrier.run())

    def deny(self, found: Iterable[tuple[Socket, str]], change: int) -> None:
        """Take the sockets that policies forbid now, all of them, each with the policy's name.

        The next :meth:`run` does with them what their services want.
        """
        self._denials.update(found, change)
        for held in self._denials.held():
            if held.change == change:
                _LOG.warning("policies end no socket before `sockhop approve`: %s", held.reason)

    def approve(self, changes: Iterable[int] | None = None) -> list[HeldChange]:
        """Let go what is held, all or these changes; their times begin now. Return what it was."""
        wanted = None if changes is None else set(changes)
        at = now()
        approved = [each for each in self.held() if wanted is None or each.change in wanted]
        numbers = {each.change for each in approved}
        for order in self._orders:
            if order.standing is Standing.HELD and order.change in numbers:
                order.standing, order.held, order.since = Standing.DUE, "", at
        self._denials.approve(numbers)
        self._orders.save()
        stamp = time.time()
        self._recorder.append(
            Event(
                stamp, EventKind.APPROVED, "; ".join(each.what), each.change, sockets=each.sockets
            )
            for each in approved
        )
        return approved

    @property
    def moves(self) -> Mapping[Obstacle, int]:
        """How many sockets were to be moved, by what came of it: see datapath.moving.Obstacle."""
        return self._carrier.moves

    @property
    def policies(self) -> PolicyKeeper:
        """The policies with which live sockets are compared."""
        return self._enforcer.policies

    @property
    def recorder(self) -> Recorder:
        """What keeps the record of what was done."""
        return self._recorder

    @property
    def totals(self) -> Mapping[tuple[str, str, str], int]:
        """What was done to sockets since the agent started, by action, trigger and protocol."""
        return self._recorder.totals

    def held(self) -> list[HeldChange]:
        """Return what waits for approval, by change."""
        by_change: defaultdict[tuple[int, str], list[Order]] = defaultdict(list)
        for order in self._orders:
            if order.standing is Standing.HELD:
                by_change[order.change, order.held].append(order)
        sockets = self._live() if by_change else {}
        return self._denials.held() + [
            HeldChange(
                change,
                held,
                sum(sockets.get(order.pair, 0) for order in orders),
                _summary(orders),
            )
            for (change, held), orders in sorted(by_change.items())
        ]

    def _rules(self, service: str) -> tuple[IntentRule, ...]:
        if service in self._services:
            return self._services[service].intents
        return self._orders.rules.get(service, ())

    def _earlier(self, found: Iterable[Concern]) -> list[Concern]:
        """The same concerns for sockets that know a backend under an id that it had earlier."""
        earlier: defaultdict[Member, list[Pair]] = defaultdict(list)
        for order in self._orders:
            earlier[order.member].append(order.pair)
        return [
            each._replace(pair=pair)
            for each in found
            for pair in earlier[each.member]
            if pair != each.pair
        ]

    def _reconcile(self, order: Order, at: float) -> None:
        """Compare an order with what is installed: it may have come back, or never have left."""
        there = self._installer.installed.members.get(order.member)
        if there is None:
            if order.trigger is Trigger.REMOVED and order.standing is not Standing.RETURNED:
                return
            # An agent died between noting a change and applying it.
            service, _ = split_service_port(order.service)
            order.trigger, order.since = Trigger.REMOVED, at
            order.intent = intent_for(self._rules(service), order.protocol, Trigger.REMOVED)
            order.standing = Standing.DUE
            if order.intent.kind is IntentKind.LEAVE:
                self._orders.drop(order.pair)
        elif STATE_TRIGGERS.get(there.backend.state) is order.trigger:
            return
        elif there.id == order.pair.backend:
            self._orders.drop(order.pair)
        else:
            order.standing, order.held = Standing.RETURNED, ""

    def state(self) -> Termination:
        """Return what `status` shows."""
        done: Counter[str] = Counter()
        for (action, _, _), count in self._recorder.totals.items():
            done[action] += count
        return Termination(
            self._carrier.engine_name,
            self._limits.brake,
            self._limits.approve_above,
            self.held(),
            self._carrier.draining(),
            self._carrier.parked(),
            dict(done),
            self._carrier.failures,
        )

    def _note(self, prepared: _Prepared) -> None:
        """Write what a change means into the events and the log."""
        stamp, change = time.time(), prepared.change
        groups: defaultdict[tuple[str, Trigger, str, str], list[Concern]] = defaultdict(list)
        for each, held in prepared.found:
            groups[each.member.service, each.trigger, str(each.intent), held].append(each)
        events = []
        for (service, trigger, intent, held), found in groups.items():
            names = sorted({endpoint(each.member.address, each.member.port) for each in found})
            events.append(
                Event(
                    stamp,
                    EventKind.HELD if held else EventKind.CHANGE,
                    describe(trigger, service, names) + (f", but {held}" if held else ""),
                    change,
                    split_service_port(service)[0],
                    intent,
                    sockets=sum(prepared.sockets.get(each.pair, 0) for each in found),
                )
            )
        self._recorder.append(events)
        for held in sorted({held for _, held in prepared.found} - {""}):
            _LOG.warning("change %d ends no socket before `sockhop approve`: %s", change, held)

    def _live(self) -> Mapping[Pair, int]:
        sockets, _ = live_sockets(self._maps.live.items())
        return sockets


@contextmanager
def opened_terminator(
    pins: Path,
    api: Path,
    maps: BalanceMaps,
    installer: Installer,
    limits: Limits,
    policies: PolicyKeeper,
) -> Iterator[Terminator]:
    """Yield what an agent needs for the maps below *pins*; orders and events are beside *api*."""
    with (
        choose_engine(pins) as engine,
        Resteerer(pins) as resteerer,
        Sockets(pins) as sockets,
        Listing(pins) as listing,
        Looker(listing, policies.top, engine.namespaces) as looker,
    ):
        engine.prepare()
        orders = Orders(orders_path(api), pins)
        recorder = Recorder(EventLog(events_path(api)), lambda: read_services(maps))

        def move(some: Sequence[Socket]) -> Sequence[Outcome]:
            return resteerer.resteer(some, engine.sever_sockets)

        def follow(some: Sequence[Socket]) -> Sequence[Outcome]:
            return resteerer.resteer(some, engine.sever_sockets, direct=True)

        reach = Reach(maps, sockets, engine, move, resteerer.obstacles)
        enforcer = Enforcer(installer, policies, looker, follow, maps=maps, orders=orders)
        yield Terminator(installer, orders, recorder, limits=limits, reach=reach, enforcer=enforcer)


def _order(each: Concern, change: int, at: float, held: str) -> Order:
    return Order(
        *each.member,
        pair=each.pair,
        trigger=each.trigger,
        intent=each.intent,
        change=change,
        since=at,
        standing=Standing.HELD if held else Standing.DUE,
        held=held,
    )


def _summary(orders: Sequence[Order]) -> list[str]:
    """Say what befell the backends of *orders*, a line for each service and trigger."""
    groups: defaultdict[tuple[str, Trigger], set[str]] = defaultdict(set)
    for order in orders:
        groups[order.service, order.trigger].add(endpoint(order.address, order.port))
    return [
        describe(trigger, service, sorted(names)) for (service, trigger), names in groups.items()
    ]
