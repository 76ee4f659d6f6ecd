"""What an agent would change in the policies in force, and which live sockets they forbid."""

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

import msgspec

from sockhop.agent.concerns import Rules
from sockhop.agent.desired import Wanted
from sockhop.agent.forbidden import Forbidden, Looker, forbidden
from sockhop.agent.impact import SocketGroup
from sockhop.agent.policy_installer import checksum, read_policies
from sockhop.agent.target import split_service_port
from sockhop.datapath.balancer import NotInstalled
from sockhop.datapath.listing import Listing
from sockhop.datapath.policies import PolicyMaps, PolicySetting
from sockhop.kernel.procfs import find_holders
from sockhop.model import Intent, Protocol, Trigger, endpoint, intent_for, unpack_address

__all__ = ["PolicyChange", "forbidden_groups", "policy_changes"]

_PROTOCOLS = {protocol.number: protocol for protocol in Protocol}


class PolicyChange(msgspec.Struct):
    """A policy that would come or go; or, without a name, some that would say something else.

    `action`: add, change, remove.
    """

    action: str
    policy: str
    detail: str


def policy_changes(wanted: Wanted, pins: Path) -> list[PolicyChange]:
    """Return what would change in the maps below *pins*, which need not be there."""
    enforced = {each.name: each for each in wanted.desired.policies if not each.refused}
    before, old = {}, 0
    try:
        with PolicyMaps(pins) as maps:
            before = {(each.name, each.action): each for each in read_policies(maps)}
            old = maps.setting(PolicySetting.CHECKSUM)
    except NotInstalled:
        pass
    if checksum(wanted.table, wanted.desired.policies) == old:
        return []
    now = {(name, policy.action): policy for name, policy in enforced.items()}
    changes = [
        PolicyChange("add", name, f"{action}, rules: {len(policy.rules)}")
        for (name, action), policy in now.items()
        if (name, action) not in before
    ]
    changes += [PolicyChange("remove", name, action) for name, action in before.keys() - now.keys()]
    return changes or [PolicyChange("change", "", "clients or rules of some policies")]


def forbidden_groups(
    wanted: Wanted, rules: Rules, names: Mapping[int, str], pins: Path, top: Path
) -> list[SocketGroup]:
    """Return the live sockets that the policies would forbid, made in the cgroup *top* or below.

    *rules*: what services say of intents; *names*: of service ports, by their ids.
    """
    with Listing(pins) as listing, Looker(listing, top) as looker:
        scene = looker.look(wanted.table, (), balanced=False)
        found = forbidden(scene, wanted.table)
        dialled = looker.dialled(each.socket for each in found)
    return list(_groups([each for each in found if each.socket.cookie in dialled], rules, names))


def _groups(
    found: list[Forbidden], rules: Rules, names: Mapping[int, str]
) -> Iterator[SocketGroup]:
    holders = find_holders(each.socket.inode for each in found)
    counts: Counter[tuple[str, str, str, Protocol, Intent, int, tuple[str, ...]]] = Counter()
    for each in found:
        made, protocol = each.socket, _PROTOCOLS[each.socket.protocol]
        port = names.get(made.pair.service, "") if made.pair else ""
        intent = intent_for(rules(split_service_port(port)[0]), protocol, Trigger.DENIED)
        there = endpoint(unpack_address(made.remote_address), made.remote_port)
        owners = tuple(sorted({str(holder) for holder in holders.get(made.inode, ())}))
        counts[each.policy, port, there, protocol, intent, made.netns, owners] += 1
    for (policy, port, there, protocol, intent, netns, owners), count in sorted(
        counts.items(), key=str
    ):
        yield SocketGroup(
            intent.kind,
            f"policy {policy}",
            *split_service_port(port),
            backend=there,
            protocol=protocol,
            intent=str(intent),
            netns=netns,
            processes=list(owners),
            sockets=count,
        )
