"""Puts tables of policies in force, whole: a socket meets those of before or the new ones."""

import hashlib
import socket
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from sockhop.agent.policy_table import Network, PolicyTable, PortPrefix, Verdict
from sockhop.datapath.policies import (
    ClientKey,
    NetworkKey,
    PolicyFlag,
    PolicyMaps,
    PolicyRecord,
    PolicySetting,
    PortKey,
    VerdictRecord,
)
from sockhop.errors import SockhopError, SystemLackError
from sockhop.kernel.maps import Map
from sockhop.kernel.syscall import grace_period
from sockhop.model import Policy, PolicyAction

__all__ = ["InstalledPolicy", "PolicyInstaller", "checksum", "flags_of", "read_policies"]


class InstalledPolicy(NamedTuple):
    """A policy in force: its id, its name, and how many connects and datagrams it has denied."""

    id: int
    name: str
    action: PolicyAction
    denied: int


def read_policies(maps: PolicyMaps) -> list[InstalledPolicy]:
    """Return the policies that the maps name."""
    return [
        InstalledPolicy(
            number,
            record.name.rstrip(b"\0").decode(errors="replace"),
            PolicyAction.ALLOW if record.allows else PolicyAction.DENY,
            record.denied,
        )
        for number, record in maps.policies.items()
    ]


class PolicyInstaller:
    """Writes to the maps of policies. There is one at a time."""

    def __init__(self, maps: PolicyMaps) -> None:
        """Take over what is in force, and delete what a dead agent has left half-written."""
        self._maps = maps
        self._trusted = True
        self._forget()

    def apply(self, table: PolicyTable, policies: Sequence[Policy]) -> bool:
        """Put *table* in force, made of *policies*; return whether it differs from before.

        SystemLackError, before anything changes, where a map has no room for it beside the table
        that is in force.
        """
        maps, number = self._maps, checksum(table, policies)
        if self._trusted and maps.setting(PolicySetting.CHECKSUM) == number:
            return False
        enforced = [policy for policy in policies if not policy.refused]
        self._check_room(table, len(enforced))
        self._trusted = False  # until all is done
        self._set(PolicySetting.CHECKSUM, 0)
        if not table:
            self._set(PolicySetting.WORD, 0)
        else:
            epoch = maps.setting(PolicySetting.LATEST) + 1
            self._set(PolicySetting.LATEST, epoch)
            try:
                self._write(table, epoch, self._name(enforced))
            except SockhopError:
                self._forget()
                raise
            self._set(PolicySetting.WORD, epoch << 32 | flags_of(table))
        self._set(PolicySetting.CHECKSUM, number)
        # From here on no hook that still goes by the old epoch is running.
        grace_period()
        self._forget({(policy.name, policy.action) for policy in enforced})
        self._trusted = True
        return True

    def distrust(self) -> None:
        """Write everything anew at the next apply(), whatever is installed."""
        self._trusted = False

    def _write(self, table: PolicyTable, epoch: int, ids: dict[str, int]) -> None:
        """Write all that *epoch* says; no word names it yet."""
        maps = self._maps
        groups = self._new_ids(len(table.classes))
        sets = self._new_ids(len(table.sets))
        self._store(
            maps.ports,
            (
                (_port_key(group, prefix), _verdict(verdict, ids))
                for group, ports in zip(groups, table.classes, strict=True)
                for prefix, verdict in ports
            ),
        )
        self._store(
            maps.networks,
            (
                (_network_key(rules, network), groups[at])
                for rules, networks in zip(sets, table.sets, strict=True)
                for network, at in networks
            ),
        )
        self._store(
            maps.clients,
            (
                (ClientKey(*client, epoch), 0 if number is None else sets[number])
                for client, number in table.clients.items()
            ),
        )

    def _store(self, target: Map[Any, Any], entries: Iterable[tuple[Any, Any]]) -> None:
        rows = [(target.key.encode(key), target.value.encode(value)) for key, value in entries]
        target.update_encoded(rows)
        if (key := target.first_difference(rows)) is not None:
            raise SockhopError(
                f"the map {target.name} does not hold at {key.hex()} what was written there",
                hint="does something else write to the pinned maps? restart the agent",
            )

    def _name(self, policies: Iterable[Policy]) -> dict[str, int]:
        """Return the ids of policies by name; new ones get one, the others keep their counts."""
        known = {(old.name, old.action): old.id for old in read_policies(self._maps)}
        fresh = [p for p in policies if (p.name, p.action) not in known]
        for number, policy in zip(self._new_ids(len(fresh)), fresh, strict=True):
            allows = policy.action is PolicyAction.ALLOW
            self._maps.policies.set(number, PolicyRecord(policy.name.encode(), 0, allows))
            known[policy.name, policy.action] = number
        return {policy.name: known[policy.name, policy.action] for policy in policies}

    def _forget(self, enforced: set[tuple[str, PolicyAction]] | None = None) -> None:
        """Delete all that no word leads to, and the names of policies but *enforced*."""
        maps = self._maps
        epoch = maps.setting(PolicySetting.WORD) >> 32
        old = [key for key in maps.clients.keys() if key.epoch != epoch]
        maps.clients.delete_many(old)
        sets = {number for _, number in maps.clients.items()}
        maps.networks.delete_many([key for key in maps.networks.keys() if key.rules not in sets])
        groups = {number for _, number in maps.networks.items()}
        maps.ports.delete_many([key for key in maps.ports.keys() if key.group not in groups])
        if enforced is not None:
            gone = [p.id for p in read_policies(maps) if (p.name, p.action) not in enforced]
            maps.policies.delete_many(gone)

    def _check_room(self, table: PolicyTable, policies: int) -> None:
        maps = self._maps
        for target, needed in (
            (maps.clients, len(table.clients)),
            (maps.networks, sum(map(len, table.sets))),
            (maps.ports, sum(map(len, table.classes))),
            (maps.policies, policies),
        ):
            total = target.used() + needed
            if total > target.max_entries:
                raise SystemLackError(
                    f"the map {target.name} has room for {target.max_entries:,} entries, "
                    f"these policies need {total:,} while they replace those of before",
                    hint="the policies of before stay in force; a larger size is set by "
                    f"`sockhop detach` and then `sockhop agent --map-size {target.name}={total}`",
                )

    def _new_ids(self, n: int) -> range:
        first = max(self._maps.setting(PolicySetting.NEXT), 1)
        self._set(PolicySetting.NEXT, first + n)
        return range(first, first + n)

    def _set(self, which: PolicySetting, value: int) -> None:
        self._maps.settings.set(which, value)


def flags_of(table: PolicyTable) -> PolicyFlag:
    """Return by what the clients of *table* are told."""
    flags = PolicyFlag(0)
    if any(client.netns for client in table.clients):
        flags |= PolicyFlag.SPACES
    if any(client.cgroup for client in table.clients):
        flags |= PolicyFlag.CGROUPS
    return flags


def checksum(table: PolicyTable, policies: Iterable[Policy]) -> int:
    """Return what tells *table*, made of *policies*, from others; 0 if it says nothing."""
    if not table:
        return 0
    names = [(policy.name, policy.action) for policy in policies if not policy.refused]
    said = repr((names, table)).encode()
    return int.from_bytes(hashlib.blake2b(said, digest_size=8).digest(), "big")


def _network_key(rules: int, network: Network) -> NetworkKey:
    return NetworkKey(32 + network.length, rules, network.address)


def _port_key(group: int, prefix: PortPrefix) -> PortKey:
    return PortKey(48 + prefix.length, group, prefix.protocol, socket.htons(prefix.port))


def _verdict(verdict: Verdict, ids: dict[str, int]) -> VerdictRecord:
    return VerdictRecord(ids.get(verdict.policy, 0), verdict.denied)
