"""Policies as the sources ask for them, kept in force."""

import logging
from collections.abc import Iterable, Iterator
from pathlib import Path

from msgspec import structs

from sockhop.agent.places import PlaceFinder
from sockhop.agent.policy_check import check_policies
from sockhop.agent.policy_installer import PolicyInstaller
from sockhop.agent.policy_table import PolicyTable, compile_policies
from sockhop.agent.state import PolicyState
from sockhop.datapath.policies import PolicyMaps, can_tell_cgroups
from sockhop.model import Clients, Desired, Policy, Redirect

__all__ = ["PolicyKeeper", "enforceable", "policy_states", "table_of"]

_LOG = logging.getLogger(__name__)
_BLIND = "this kernel (before Linux 6.2) does not tell the hooks a socket's cgroup"


class PolicyKeeper:
    """Puts the policies of the sources in force, and knows what they say."""

    def __init__(self, maps: PolicyMaps, top: Path) -> None:
        """*top*: the cgroup where the hooks are attached."""
        self.top = top
        self._maps = maps
        self._sound = False
        self._inputs: object = None
        self._installer = PolicyInstaller(maps)
        self._policies: dict[str, Policy] = {}
        self.table = PolicyTable({}, (), ())
        """What is in force."""

    def apply(self, desired: Desired, home: int, places: PlaceFinder) -> bool:
        """Enforce the policies of *desired*, see enforceable(); return whether that is a change.

        *home*: the netns cookie of the host; *places* has looked for those that they name.
        SockhopError where the maps do not take them: then those of before stay in force.
        """
        inputs = desired.policies, home, places.found, places.cgroups()
        if inputs == self._inputs:
            return False
        self._inputs = None
        table = table_of(desired, home, places)
        if not self._sound and any(True for _ in check_policies(table, self._maps)):
            # A dead agent has left it so, or something has damaged it, whatever its checksum says.
            self._installer.distrust()
        changed = self._installer.apply(table, desired.policies)
        before, self._policies = self._policies, {each.name: each for each in desired.policies}
        self.table, self._sound, self._inputs = table, True, inputs
        for line in _changes(before, self._policies):
            _LOG.info("%s", line)
        return changed


def table_of(desired: Desired, home: int, places: PlaceFinder) -> PolicyTable:
    """Return what the policies of *desired* mean here, as :meth:`PolicyKeeper.apply` has it."""
    cgroups = places.cgroups()
    spaces = {path: number for path, number in places.found.items() if path not in cgroups}
    return compile_policies(desired.policies, home, spaces, cgroups)


def enforceable(desired: Desired) -> Desired:
    """Return *desired*, in which what this kernel cannot enforce is refused."""
    if can_tell_cgroups():
        return desired
    policies = tuple(
        structs.replace(policy, refused=(*policy.refused, _BLIND))
        if policy.clients and (policy.clients.cgroups or policy.clients.exclude)
        else policy
        for policy in desired.policies
    )
    redirects = tuple(
        structs.replace(redirect, refused=(*redirect.refused, _BLIND))
        if redirect.exempt
        else redirect
        for redirect in desired.redirects
    )
    return structs.replace(desired, policies=policies, redirects=redirects)


def policy_states(desired: Desired, places: PlaceFinder) -> list[PolicyState]:
    """Return what the agent says of each policy and redirect."""
    return [
        *(_policy_state(policy, places) for policy in desired.policies),
        *(_redirect_state(redirect, places) for redirect in desired.redirects),
    ]


def _policy_state(policy: Policy, places: PlaceFinder) -> PolicyState:
    return PolicyState(
        policy.name,
        policy.action,
        str(policy.clients or Clients()),
        list(map(str, policy.rules)),
        list(policy.refused),
        places.missing(policy.clients),
        list(policy.rules),
    )


def _redirect_state(redirect: Redirect, places: PlaceFinder) -> PolicyState:
    clients = Clients(exclude=redirect.exempt)
    return PolicyState(
        redirect.name,
        "redirect",
        str(clients),
        [f"{each} to {','.join(map(str, each.backends))}" for each in redirect.frontends],
        list(redirect.refused),
        places.missing(clients) if not redirect.refused else [],
    )


def _changes(before: dict[str, Policy], now: dict[str, Policy]) -> Iterator[str]:
    for name, policy in now.items():
        old = before.get(name)
        if old == policy or (policy.refused and (old is None or old.refused)):
            continue
        if policy.refused:
            yield f"- policy {name}: refused from now on"
        else:
            sign = "+" if old is None or old.refused else "~"
            yield f"{sign} policy {name}: {policy.action} {_count(policy.rules)}"
    yield from (f"- policy {name}" for name in before.keys() - now.keys())


def _count(rules: Iterable[object]) -> str:
    number = sum(1 for _ in rules)
    return f"{number} rule{'' if number == 1 else 's'}"
