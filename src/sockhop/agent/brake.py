"""When a change should not end or move live sockets before somebody approves of it."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from sockhop.agent.concerns import Concern
from sockhop.agent.plan import Installed, Plan
from sockhop.agent.target import is_redirect, split_service_port
from sockhop.datapath.sockets import Pair
from sockhop.model import BackendState, IntentKind

__all__ = ["Limits", "may_end"]

_NAMED = 3


def may_end(found: Iterable[Concern], sockets: Mapping[Pair, int]) -> int:
    """Return how many sockets these concerns may end at most; those that move are not ended."""
    return sum(
        sockets.get(each.pair, 0)
        for each in found
        if each.intent.kind in (IntentKind.SEVER, IntentKind.DRAIN)
    )


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a change may do unasked.

    brake: one that leaves a service without backends, or takes more than half of all, waits;
    approve_above: so does one that may end more sockets than this; None: however many.
    """

    brake: bool = True
    approve_above: int | None = None

    def reason_to_wait(self, plan: Plan, installed: Installed, ending: int) -> str:
        """Say why *plan* has to wait; "" if it has not.

        *installed*: all that is installed before it; *ending*: live sockets that it may end.

        What is waited for looks like a source that was emptied. So backends that were terminating
        do not count, they were expected to go; and one that comes makes up for one that goes from
        the same service.
        """
        if self.approve_above is not None and ending > self.approve_above:
            return f"it may end {ending:,} sockets, more than {self.approve_above:,}"
        if not self.brake or not plan.gone:
            return ""
        before, change = _balance(plan, installed)
        emptied = sorted(n for n, by in change.items() if before[n] and before[n] + by <= 0)
        if emptied:
            more = len(emptied) - _NAMED
            others = f" and {more} more services" if more > 0 else ""
            return f"it removes all backends of {', '.join(emptied[:_NAMED])}{others}"
        lost, total = -sum(by for by in change.values() if by < 0), before.total()
        return f"it removes {lost:,} of {total:,} backends" if lost * 2 > total else ""


def _balance(plan: Plan, installed: Installed) -> tuple[Counter[str], Counter[str]]:
    """Return by service how many backends there are, and how many more there will be."""
    before: Counter[str] = Counter()
    for member, old in installed.members.items():
        if is_redirect(member.service):
            continue
        before[split_service_port(member.service)[0]] += _counts(old.backend.state)
    change: Counter[str] = Counter()
    for member in plan.gone:
        if is_redirect(member.service):
            continue
        state = installed.members[member].backend.state
        change[split_service_port(member.service)[0]] -= _counts(state)
    for member in plan.members.keys() - installed.members.keys():
        change[split_service_port(member.service)[0]] += 1
    return before, change


def _counts(state: BackendState) -> bool:
    return state is not BackendState.TERMINATING
