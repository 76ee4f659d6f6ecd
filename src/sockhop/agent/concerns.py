"""Which backends a plan takes from their services or puts into another state, and what follows."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

from sockhop.agent.plan import Installed, Plan
from sockhop.agent.target import Member, is_redirect, split_service_port
from sockhop.datapath.records import LiveKey
from sockhop.datapath.sockets import Pair
from sockhop.model import (
    BackendState,
    Intent,
    IntentRule,
    Trigger,
    intent_for,
)

__all__ = [
    "STATE_TRIGGERS",
    "Concern",
    "Rules",
    "concerns",
    "describe",
    "live_sockets",
]

Rules = Callable[[str], tuple[IntentRule, ...]]
"""Returns what a service says of intents, given its name."""

STATE_TRIGGERS = {
    BackendState.TERMINATING: Trigger.TERMINATING,
    BackendState.QUARANTINED: Trigger.QUARANTINED,
    BackendState.MAINTENANCE: Trigger.MAINTENANCE,
}


_NAMED = 5
"""So many backends are named, others counted."""


class Concern(NamedTuple):
    """A backend of a service that leaves or changes, and what should become of its sockets."""

    member: Member
    pair: Pair
    trigger: Trigger
    intent: Intent


def concerns(plan: Plan, installed: Installed, rules: Rules) -> Iterator[Concern]:
    """Yield what *plan*, made against *installed*, means for live sockets.

    A backend that leaves one service is that service's matter only, whatever else it serves.
    Redirects are no matter here.
    """
    for member in plan.gone:
        if not is_redirect(member.service):  # a matter of enforce.py
            yield _concern(member, installed, Trigger.REMOVED, rules)
    for member, backend in plan.members.items():
        old = installed.members.get(member)
        if old is not None and old.backend.state is not backend.state:
            trigger = STATE_TRIGGERS.get(backend.state)
            if trigger is not None:
                yield _concern(member, installed, trigger, rules)


def _concern(member: Member, installed: Installed, trigger: Trigger, rules: Rules) -> Concern:
    pair = Pair(installed.services[member.service], installed.members[member].id)
    service, _ = split_service_port(member.service)
    return Concern(member, pair, trigger, intent_for(rules(service), member.protocol, trigger))


def live_sockets(live: Iterable[tuple[LiveKey, int]]) -> tuple[Counter[Pair], dict[Pair, set[int]]]:
    """Return how many sockets each pair may have, and in which namespaces (cookies).

    *live* is the map's content: an upper bound, never below the truth.
    """
    sockets: Counter[Pair] = Counter()
    places: defaultdict[Pair, set[int]] = defaultdict(set)
    for key, count in live:
        if count:
            pair = Pair(key.service, key.backend)
            sockets[pair] += count
            places[pair].add(key.netns)
    return sockets, places


def describe(trigger: Trigger, service: str, backends: Sequence[str]) -> str:
    """Return, for people, what befell backends of a service port."""
    more = len(backends) - _NAMED
    names = ", ".join(backends[:_NAMED]) + (f" and {more} more" if more > 0 else "")
    several = len(backends) > 1
    if trigger is Trigger.REMOVED:
        return f"{names} {'were' if several else 'was'} removed from {service}"
    state = "in maintenance" if trigger is Trigger.MAINTENANCE else trigger
    return f"{names} of {service} {'are' if several else 'is'} {state}"
