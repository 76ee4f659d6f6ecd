"""What the pinned maps say, followed as a hook does, by bpftool and without any codec of ours."""

import socket
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.clients.bpftool import address_of, map_entries, netns_cookie

__all__ = [
    "ABSENT",
    "SCOPED",
    "STATES",
    "Dialled",
    "Member",
    "Served",
    "assert_served",
    "dump",
    "members_of",
    "served_of",
    "services_of",
]

MAPS = ("settings", "frontends", "words", "slots", "backends", "services")
STATES = ("active", "terminating", "quarantined", "maintenance")
SCOPED, ABSENT = 1, 2

Endpoint = tuple[str, int]


class Dialled(NamedTuple):
    """A frontend key. `home`: holds in the agent's network namespace only."""

    address: str
    port: int
    protocol: str
    home: bool = False


class Served(NamedTuple):
    """What a connect there meets: `shares` sum up to 1."""

    service: str
    flags: int
    shares: dict[Endpoint, float]


class Member(NamedTuple):
    service: str
    endpoint: Endpoint
    protocol: str
    weight: int
    state: str


def protocol_name(number: int) -> str:
    return {socket.IPPROTO_TCP: "tcp", socket.IPPROTO_UDP: "udp"}[number]


def services_of(pins: Path) -> dict[int, str]:
    return {number: value["name"] for number, value in map_entries(pins, "services")}


def served_of(pins: Path) -> dict[Dialled, Served]:
    """Follow each frontend through its word to its slots; nothing else may be there."""
    words = dict(map_entries(pins, "words"))
    backends = dict(map_entries(pins, "backends"))
    names = services_of(pins)
    slots = {tuple(key.values()): value for key, value in map_entries(pins, "slots")}
    assert all(tuple(value["key"].values()) == key for key, value in slots.items())
    found: dict[Dialled, Served] = {}
    reached: set[tuple[int, ...]] = set()
    ids: set[int] = set()
    for key, value in map_entries(pins, "frontends"):
        assert value["key"] == key
        generation, rest = divmod(words[value["id"]], 1 << 32)
        algorithm, count = divmod(rest, 1 << 28)
        assert not algorithm, "only weighted random is decoded here"
        positions = [(value["id"], generation, i) for i in range(count)]
        assert not reached & set(positions)
        reached |= set(positions)
        ids.add(value["id"])
        mine = [slots[position] for position in positions]
        for slot in mine:
            assert_same_backend(slot, backends[slot["backend"]], key, value)
        assert key["netns"] in (0, netns_cookie())
        where = Dialled(
            address_of(key["address"]), key["port"], protocol_name(key["protocol"]),
            bool(key["netns"]),
        )  # fmt: skip
        found[where] = Served(names[value["service"]], value["flags"], shares_of(mine))
    assert reached == slots.keys(), "slots that no word names"
    assert {number for number, word in words.items() if word} <= ids, "words of no frontend"
    return found


def assert_same_backend(slot: Any, backend: Any, key: Any, frontend: Any) -> None:
    """A slot repeats its backend, which belongs to the frontend's service and protocol."""
    for field in ("address", "port", "weight", "state"):
        assert slot[field] == backend[field], field
    assert backend["service"] == frontend["service"]
    assert backend["protocol"] == key["protocol"]


def shares_of(slots: list[Any]) -> dict[Endpoint, float]:
    """How often each backend is chosen: a slot when a random u32 is at most `keep`, else its alias.

    See struct slot in bpf/sockhop.h.
    """
    shares = {(address_of(slot["address"]), slot["port"]): 0.0 for slot in slots}
    endpoints = list(shares)
    assert len(endpoints) == len(slots)
    for own, slot in zip(endpoints, slots, strict=True):
        kept = (slot["keep"] + 1) / (1 << 32)
        shares[own] += kept / len(slots)
        if kept < 1:
            shares[endpoints[slot["alias"]]] += (1 - kept) / len(slots)
    return shares


def members_of(pins: Path) -> set[Member]:
    names = services_of(pins)
    entries = map_entries(pins, "backends")
    members = {
        Member(
            names[value["service"]],
            (address_of(value["address"]), value["port"]),
            protocol_name(value["protocol"]),
            value["weight"],
            STATES[value["state"]],
        )
        for _, value in entries
    }
    assert len(members) == len(entries)
    return members


def assert_served(pins: Path, expected: dict[Dialled, Served]) -> None:
    found = served_of(pins)
    assert found.keys() == expected.keys()
    for where, served in expected.items():
        assert found[where][:2] == served[:2], where
        assert found[where].shares == pytest.approx(served.shares, abs=1e-8), where
    assert set(services_of(pins).values()) == {served.service for served in expected.values()}


def dump(pins: Path) -> dict[str, list[Any]]:
    return {name: sorted(map_entries(pins, name), key=str) for name in MAPS}
