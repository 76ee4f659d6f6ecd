"""What a plan means for live sockets, before anything is done."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import msgspec

from sockhop.agent.brake import Limits, may_end
from sockhop.agent.concerns import Concern, Rules, concerns
from sockhop.agent.plan import Installed, Plan
from sockhop.agent.target import split_service_port
from sockhop.datapath.sockets import Pair, Socket, Sockets
from sockhop.kernel.procfs import find_holders
from sockhop.model import endpoint

__all__ = ["Impact", "SocketGroup", "find_impact"]


class SocketGroup(msgspec.Struct):
    """Live sockets that a plan concerns: of one backend, process and network namespace.

    `action` is the intent's (leave, drain, sever, resteer), `intent` all of it; `processes` are
    those that hold the sockets, as command/pid; `netns` is an inode.
    """

    action: str
    trigger: str
    service: str
    port_name: str
    backend: str
    protocol: str
    intent: str
    netns: int
    processes: list[str]
    sockets: int


class Impact(msgspec.Struct):
    """All of them; `held`: why the agent would wait for `sockhop approve`, "" if it would not."""

    groups: list[SocketGroup]
    held: str = ""

    @property
    def totals(self) -> dict[str, int]:
        """How many sockets there are by action."""
        totals: Counter[str] = Counter()
        for group in self.groups:
            totals[group.action] += group.sockets
        return dict(totals)


def find_impact(
    plan: Plan, installed: Installed, rules: Rules, limits: Limits, pins: Path
) -> Impact:
    """Return which sockets of the maps below *pins* are concerned by *plan*, and how.

    *rules*: what services say of intents. Sockets in the middle of connect() may be missed.
    """
    found = {each.pair: each for each in concerns(plan, installed, rules)}
    if not found:
        return Impact([])
    with Sockets(pins) as programs:
        sockets = [each for each in programs.of_pairs(list(found)) if not each.reason_to_leave]
    counts = Counter(each.pair for each in sockets if each.pair)
    held = limits.reason_to_wait(plan, installed, may_end(found.values(), counts)) if counts else ""
    return Impact(_groups(sockets, found), held)


def _groups(sockets: Sequence[Socket], found: dict[Pair, Concern]) -> list[SocketGroup]:
    holders = find_holders(each.inode for each in sockets)
    counts: Counter[tuple[Concern, int, tuple[str, ...]]] = Counter()
    for each in sockets:
        names = sorted({str(holder) for holder in holders.get(each.inode, ())})
        if each.pair:
            counts[found[each.pair], each.netns, tuple(names)] += 1
    groups = [
        SocketGroup(
            concern.intent.kind,
            concern.trigger,
            *split_service_port(concern.member.service),
            backend=endpoint(concern.member.address, concern.member.port),
            protocol=concern.member.protocol,
            intent=str(concern.intent),
            netns=netns,
            processes=list(names),
            sockets=count,
        )
        for (concern, netns, names), count in counts.items()
    ]
    return sorted(groups, key=msgspec.structs.astuple)
