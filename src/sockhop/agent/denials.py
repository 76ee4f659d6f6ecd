"""What becomes of live sockets that a policy forbids: at once, or after a drain."""

import logging
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence

from sockhop.agent.brake import Limits
from sockhop.agent.carry_out import SLOW, Reach
from sockhop.agent.concerns import Rules
from sockhop.agent.drain import Drain
from sockhop.agent.orders import now
from sockhop.agent.record import Cause, Recorder
from sockhop.agent.state import HeldChange
from sockhop.agent.target import split_service_port
from sockhop.datapath.ending import Outcome
from sockhop.datapath.progress import probe_peers
from sockhop.datapath.sockets import Socket
from sockhop.errors import SockhopError
from sockhop.model import Intent, IntentKind, Protocol, Trigger, intent_for

__all__ = ["Denials"]

_LOG = logging.getLogger(__name__)
_PROTOCOLS = {protocol.number: protocol for protocol in Protocol}
_SEVER = Intent(IntentKind.SEVER)


class _Denial:
    """A socket that is forbidden, why, and what its service wants for it."""

    def __init__(self, each: Socket, policy: str, intent: Intent, change: int) -> None:
        at = now()
        self.socket, self.policy, self.intent, self.change = each, policy, intent, change
        self.held = ""
        self.over = at
        self.drain: Drain | None = None
        if intent.kind is IntentKind.DRAIN:
            tcp = _PROTOCOLS.get(each.protocol) is Protocol.TCP
            self.drain = Drain(intent, at, at) if tcp else None
            after = intent.deadline if tcp else intent.after
            self.over = math.inf if after is None else at + after

    @property
    def next(self) -> float:
        """When to look at it again."""
        if self.held:
            return math.inf
        return min(self.over, self.drain.next) if self.drain else self.over

    @property
    def cause(self) -> Cause:
        """What the record says."""
        reason = f"policy {self.policy} denies it"
        return Cause(Trigger.DENIED, reason, intent=str(self.intent), change=self.change)


class Denials:
    """The sockets that policies forbid now, until they are ended.

    Not kept over a restart: the next agent finds the same sockets.
    """

    def __init__(
        self,
        reach: Reach,
        recorder: Recorder,
        limits: Limits,
        names: Callable[[], Mapping[int, str]],
        rules: Rules,
    ) -> None:
        """*names* returns the service ports by their ids, *rules* what a service says."""
        self._reach = reach
        self._recorder = recorder
        self._limits = limits
        self._names = names
        self._rules = rules
        self._denials: dict[int, _Denial] = {}

    def update(self, found: Iterable[tuple[Socket, str]], change: int) -> None:
        """Take what is forbidden now, all of it, each socket with the name of the policy.

        What was forbidden before keeps its time; what is not forbidden any more is spared.
        """
        known, self._denials = self._denials, {}
        new: list[_Denial] = []
        names: Mapping[int, str] | None = None
        for each, policy in found:
            if (denial := known.get(each.cookie)) is None:
                names = self._names() if names is None else names
                intent = self._intent(each, names)
                if intent.kind is IntentKind.LEAVE:
                    continue
                denial = _Denial(each, policy, intent, change)
                new.append(denial)
            self._denials[each.cookie] = denial
        most = self._limits.approve_above
        if most is not None and len(new) > most:
            for denial in new:
                denial.held = f"it may end {len(new):,} sockets, more than {most:,}"

    def held(self) -> list[HeldChange]:
        """Return what waits for approval."""
        counts: Counter[tuple[int, str]] = Counter()
        policies: dict[int, set[str]] = {}
        for denial in self._denials.values():
            if denial.held:
                counts[denial.change, denial.held] += 1
                policies.setdefault(denial.change, set()).add(denial.policy)
        return [
            HeldChange(
                change, why, count, [f"policy {name} denies" for name in sorted(policies[change])]
            )
            for (change, why), count in sorted(counts.items())
        ]

    def approve(self, changes: set[int]) -> None:
        """Let go what is held of these changes."""
        for cookie, old in list(self._denials.items()):
            if old.held and old.change in changes:
                self._denials[cookie] = _Denial(old.socket, old.policy, old.intent, old.change)

    def run(self) -> float:
        """Do what is due; return when to come again, in the time of now()."""
        at = now()
        due = [denial for denial in self._denials.values() if denial.next <= at]
        try:
            if due:
                self._recorder.record(self._carry_out(due, at))
        except SockhopError as error:
            _LOG.error("forbidden sockets are as they were, another try follows: %s", error)
            return at + SLOW
        return min((denial.next for denial in self._denials.values()), default=math.inf)

    def _carry_out(self, due: Sequence[_Denial], at: float) -> list[tuple[Outcome, Cause]]:
        causes = {denial.socket.cookie: denial.cause for denial in due}
        end = [denial.socket for denial in due if at >= denial.over and not _moves(denial)]
        move = [denial.socket for denial in due if _moves(denial)]
        looked = self._looked_at([d for d in due if at < d.over and d.drain], at)
        outcomes: list[Outcome] = []
        if end or looked:
            outcomes += self._reach.engine.sever_sockets([*end, *looked])
        if move:
            outcomes += self._reach.move(move)
        for each in outcomes:
            self._denials.pop(each.socket.cookie, None)
        return [(each, causes[each.socket.cookie]) for each in outcomes]

    def _looked_at(self, due: Sequence[_Denial], at: float) -> list[Socket]:
        """Return which of those that drain should end; probe the others."""
        if not due:
            return []
        there = {each.cookie: each for each in self._reach.sockets.remembered()}
        end: list[Socket] = []
        probe: list[Socket] = []
        for denial in due:
            each = there.get(denial.socket.cookie)
            if each is None or denial.drain is None:
                self._denials.pop(denial.socket.cookie, None)
                continue
            verdict = denial.drain.look([each], at)
            end += verdict.end
            probe += verdict.probe
        reached = probe_peers(probe) if probe else set()
        for denial in due:
            if denial.drain:
                denial.drain.reached({denial.socket.cookie} & reached)
        return end

    def _intent(self, each: Socket, names: Mapping[int, str]) -> Intent:
        protocol, origin = _PROTOCOLS.get(each.protocol), each.origin
        if protocol is None:
            return _SEVER
        balanced = origin is not None and each.current
        service = names.get(origin.service, "") if origin and balanced else ""
        rules = self._rules(split_service_port(service)[0]) if service else ()
        return intent_for(rules, protocol, Trigger.DENIED)


def _moves(denial: _Denial) -> bool:
    return denial.intent.kind is IntentKind.RESTEER
