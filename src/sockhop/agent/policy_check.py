"""Compares the policies that the maps hold with those that there should be."""

import socket
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import TypeAlias

from sockhop.agent.policy_installer import flags_of, read_policies
from sockhop.agent.policy_table import Client, Network, PolicyTable, PortPrefix, Verdict
from sockhop.agent.soundness import Finding
from sockhop.datapath.policies import PolicyMaps, PolicySetting

__all__ = ["check_policies"]

_Rules: TypeAlias = Mapping[Network, Mapping[PortPrefix, Verdict]]
_Clients: TypeAlias = Mapping[Client, _Rules | None]


def check_policies(table: PolicyTable, maps: PolicyMaps) -> Iterator[Finding]:
    """Yield where what is installed is not *table*, for each kind of clients."""
    wanted, installed = _meant(table), _installed(maps)
    for client in sorted(wanted.keys() | installed.keys()):
        if client not in wanted or client not in installed or wanted[client] != installed[client]:
            yield Finding("desired", _text(client), _size(client, wanted), _size(client, installed))
    flags = maps.setting(PolicySetting.WORD) & 0xFFFFFFFF
    if wanted and flags != flags_of(table):
        yield Finding(
            "desired", "policies: word", f"flags {int(flags_of(table))}", f"flags {flags}"
        )


def _meant(table: PolicyTable) -> _Clients:
    return {
        client: None
        if number is None
        else {network: dict(table.classes[group]) for network, group in table.sets[number]}
        for client, number in table.clients.items()
    }


def _installed(maps: PolicyMaps) -> _Clients:
    word = maps.setting(PolicySetting.WORD)
    if not word:
        return {}
    names = {policy.id: policy.name for policy in read_policies(maps)}
    groups: defaultdict[int, dict[PortPrefix, Verdict]] = defaultdict(dict)
    for key, found in maps.ports.items():
        prefix = PortPrefix(key.protocol, socket.ntohs(key.port), key.prefixlen - 48)
        name = names.get(found.policy, "?") if found.denied else ""
        groups[key.group][prefix] = Verdict(bool(found.denied), name)
    sets: defaultdict[int, dict[Network, dict[PortPrefix, Verdict]]] = defaultdict(dict)
    for place, group in maps.networks.items():
        sets[place.rules][Network(place.address, place.prefixlen - 32)] = groups[group]
    return {
        Client(who.netns, who.cgroup): sets[number] if number else None
        for who, number in maps.clients.items()
        if who.epoch == word >> 32
    }


def _text(client: Client) -> str:
    space = f"netns-cookie {client.netns}" if client.netns else "other namespaces"
    group = f"cgroup {client.cgroup}" if client.cgroup else "other cgroups"
    return f"policies: {space}, {group}"


def _size(client: Client, clients: _Clients) -> str:
    if client not in clients:
        return "nothing"
    rules = clients[client]
    if rules is None:
        return "no policy"
    ports = sum(map(len, rules.values()))
    denied = sum(verdict.denied for group in rules.values() for verdict in group.values())
    return f"{len(rules)} networks, {ports} ranges of ports, {denied} denied"
