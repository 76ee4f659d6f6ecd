"""Policies and redirects for people and programs: what is in force, and what is not, and why."""

from pathlib import Path

import msgspec

from sockhop.agent.client import ask_agent
from sockhop.agent.policy_installer import InstalledPolicy, read_policies
from sockhop.agent.state import PolicyState
from sockhop.datapath.policies import PolicyMaps

__all__ = ["LIMITS", "PolicyRow", "list_policies"]

LIMITS = (
    "ingress: a policy speaks of who connects or sends, never of who is connected to",
    "raw and packet sockets, and SCTP: they meet no hook",
    "sockets made in another cgroup and handed over: they keep the policies of that cgroup",
    "sockets made outside the cgroup that sockhop is attached to",
)
"""What no policy is enforced on."""


class PolicyRow(msgspec.Struct):
    """A policy or redirect. `denied`: connects and datagrams since it is in force.

    `clients`, `targets` and `reasons` are known to a running agent only.
    """

    policy: str
    action: str
    enforced: str
    clients: str
    targets: list[str]
    denied: int
    reasons: list[str]
    limits: list[str]
    id: int


def list_policies(pins: Path, api: Path) -> list[PolicyRow]:
    """Return what the maps below *pins* hold, and what an agent at *api* says of them.

    NotInstalled where there are no maps.
    """
    with PolicyMaps(pins) as maps:
        installed = {found.name: found for found in read_policies(maps)}
    agent = ask_agent(api)
    rows = (
        [_wanted(each, installed.get(each.name)) for each in agent.state.policies] if agent else []
    )
    known = {row.policy for row in rows}
    rows += [_installed(found) for name, found in installed.items() if name not in known]
    return sorted(rows, key=lambda row: row.policy)


def _wanted(state: PolicyState, found: InstalledPolicy | None) -> PolicyRow:
    redirect = state.action == "redirect"
    there = found is not None or (redirect and not state.refused and not state.missing)
    return PolicyRow(
        state.name,
        state.action,
        "yes" if there else "no",
        state.clients,
        state.targets,
        found.denied if found else 0,
        [*state.refused, *(f"{path} is not there" for path in state.missing)],
        [] if redirect else list(LIMITS),
        found.id if found else 0,
    )


def _installed(found: InstalledPolicy) -> PolicyRow:
    return PolicyRow(
        found.name, found.action, "yes", "", [], found.denied, [], list(LIMITS), found.id
    )
