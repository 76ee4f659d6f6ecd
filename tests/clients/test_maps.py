"""What bpftool finds in the pinned maps is what the manifest says: no codec of ours is asked."""

import signal
import socket
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.clients.bpftool import address_of, map_entries, netns_cookie
from tests.sandbox import Sandbox, compact

pytestmark = pytest.mark.kernel

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
        generation, count = divmod(words[value["id"]], 1 << 32)
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


FAR, NEAR = ("10.1.0.1", 8080), ("127.0.0.1", 8081)
FAR6, NEAR6 = ("fd00:1::1", 8080), ("::1", 8081)
BOTH_FAMILIES = ["10.1.0.1:8080", "127.0.0.1:8081", "[fd00:1::1]:8080", "[::1]:8081"]

BEFORE: dict[str, Any] = {
    "weighted": {
        "frontends": ["10.96.0.10:80"],
        "backends": [
            {"address": "10.1.0.1:8080", "weight": 5},
            {"address": "10.1.0.2:8080", "weight": 3},
            {"address": "10.1.0.3:8080", "weight": 2},
            {"address": "10.1.0.4:8080", "weight": 0},
        ],
    },
    "mixed": {
        "frontends": ["10.96.0.11:53/tcp+udp", "[fd00:96::11]:53/udp"],
        "backends": BOTH_FAMILIES,
    },
    "local": {"frontends": ["127.96.0.1:80"], "backends": ["127.0.0.1:8081"]},
    "crossing": {"frontends": ["[fd00:96::12]:80"], "backends": ["10.1.0.1:8080"]},
    "states": {
        "frontends": ["10.96.0.13:80"],
        "backends": [
            {"address": f"10.1.0.{i}:8080", "state": state} for i, state in enumerate(STATES, 1)
        ],
    },
    "going": {
        "frontends": ["10.96.0.14:80"],
        "backends": [{"address": "10.1.0.1:8080", "state": "terminating"}],
    },
    "empty": {"frontends": ["10.96.0.15:80"], "backends": []},
}

SERVED_BEFORE = {
    Dialled("10.96.0.10", 80, "tcp"): Served(
        "weighted", 0, {FAR: 0.5, ("10.1.0.2", 8080): 0.3, ("10.1.0.3", 8080): 0.2}
    ),
    # Loopback is local: elsewhere the same service has its other backends only.
    Dialled("10.96.0.11", 53, "tcp"): Served("mixed", SCOPED, {FAR: 1}),
    Dialled("10.96.0.11", 53, "udp"): Served("mixed", SCOPED, {FAR: 1}),
    Dialled("fd00:96::11", 53, "udp"): Served("mixed", SCOPED, {FAR6: 1}),
    Dialled("10.96.0.11", 53, "tcp", home=True): Served("mixed", 0, {FAR: 0.5, NEAR: 0.5}),
    Dialled("10.96.0.11", 53, "udp", home=True): Served("mixed", 0, {FAR: 0.5, NEAR: 0.5}),
    Dialled("fd00:96::11", 53, "udp", home=True): Served("mixed", 0, {FAR6: 0.5, NEAR6: 0.5}),
    Dialled("127.96.0.1", 80, "tcp"): Served("local", SCOPED | ABSENT, {}),
    Dialled("127.96.0.1", 80, "tcp", home=True): Served("local", 0, {NEAR: 1}),
    Dialled("fd00:96::12", 80, "tcp"): Served("crossing", 0, {FAR: 1}),
    Dialled("10.96.0.13", 80, "tcp"): Served("states", 0, {FAR: 1}),
    Dialled("10.96.0.14", 80, "tcp"): Served("going", 0, {FAR: 1}),
    Dialled("10.96.0.15", 80, "tcp"): Served("empty", 0, {}),
}

MEMBERS_BEFORE = {
    *(
        Member("weighted", (f"10.1.0.{i}", 8080), "tcp", weight, "active")
        for i, weight in enumerate((5, 3, 2, 0), 1)
    ),
    Member("mixed", FAR, "tcp", 1, "active"),
    Member("mixed", NEAR, "tcp", 1, "active"),
    *(Member("mixed", at, "udp", 1, "active") for at in (FAR, NEAR, FAR6, NEAR6)),
    Member("local", NEAR, "tcp", 1, "active"),
    Member("crossing", FAR, "tcp", 1, "active"),
    *(
        Member("states", (f"10.1.0.{i}", 8080), "tcp", 1, state)
        for i, state in enumerate(STATES, 1)
    ),
    Member("going", FAR, "tcp", 1, "terminating"),
}


def test_the_maps_hold_what_the_manifest_says(sandbox: Sandbox) -> None:
    manifest = sandbox.manifest(compact(**BEFORE))
    with sandbox.agent(manifest) as agent:
        assert_served(sandbox.pins, SERVED_BEFORE)
        assert members_of(sandbox.pins) == MEMBERS_BEFORE

        # A backend leaves, one comes, a service goes and its address changes hands.
        after = BEFORE | {
            "weighted": {"frontends": ["10.96.0.10:80"], "backends": ["10.1.0.1:8080"]},
            "empty": {"frontends": ["10.96.0.15:80"], "backends": ["10.1.0.1:8080"]},
            "heir": {"frontends": ["127.96.0.1:80"], "backends": ["127.0.0.1:8081"]},
        }
        del after["mixed"], after["local"]
        generation = agent.status()["generation"]
        sandbox.manifest(compact(**after))
        assert agent.wait_generation(generation) == generation + 1
        expected = {w: s for w, s in SERVED_BEFORE.items() if s.service not in ("mixed", "local")}
        expected |= {
            Dialled("10.96.0.10", 80, "tcp"): Served("weighted", 0, {FAR: 1}),
            Dialled("10.96.0.15", 80, "tcp"): Served("empty", 0, {FAR: 1}),
            Dialled("127.96.0.1", 80, "tcp"): Served("heir", SCOPED | ABSENT, {}),
            Dialled("127.96.0.1", 80, "tcp", home=True): Served("heir", 0, {NEAR: 1}),
        }
        assert_served(sandbox.pins, expected)
        gone = {m for m in MEMBERS_BEFORE if m.service in ("weighted", "mixed", "local")}
        assert members_of(sandbox.pins) == (MEMBERS_BEFORE - gone) | {
            Member("weighted", FAR, "tcp", 1, "active"),
            Member("empty", FAR, "tcp", 1, "active"),
            Member("heir", NEAR, "tcp", 1, "active"),
        }

        sandbox.manifest(compact())
        agent.wait_generation(generation + 1)
        assert_served(sandbox.pins, {})
        assert members_of(sandbox.pins) == set()


def test_a_restart_changes_nothing(sandbox: Sandbox) -> None:
    manifest = sandbox.manifest(compact(**BEFORE))
    with sandbox.agent(manifest) as agent:
        before = dump(sandbox.pins)
        assert len(before["frontends"]) == len(SERVED_BEFORE)
        agent.stop(signal.SIGKILL)
    with sandbox.agent(manifest):
        assert dump(sandbox.pins) == before


KUBERNETES = """
apiVersion: v1
kind: Service
metadata: {name: echo, namespace: shop}
spec:
  type: ClusterIP
  clusterIPs: ["10.96.0.20", "fd00:96::20"]
  ports: [{name: web, port: 80, targetPort: 8080}, {name: dns, port: 53, protocol: UDP}]
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: echo-1, namespace: shop, labels: {kubernetes.io/service-name: echo}}
addressType: IPv4
ports: [{name: web, port: 8080, protocol: TCP}, {name: dns, port: 5353, protocol: UDP}]
endpoints:
  - {addresses: ["10.1.0.1"], conditions: {ready: true}}
  - {addresses: ["10.1.0.2"], conditions: {ready: false, serving: true, terminating: true}}
  - {addresses: ["10.1.0.3"], conditions: {ready: false}}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: echo-2, namespace: shop, labels: {kubernetes.io/service-name: echo}}
addressType: IPv6
ports: [{name: web, port: 8080, protocol: TCP}]
endpoints: [{addresses: ["fd00:1::1"], conditions: {}}]
"""


def test_kubernetes_objects_come_out_alike(sandbox: Sandbox) -> None:
    with sandbox.agent(sandbox.manifest(KUBERNETES)):
        served = served_of(sandbox.pins)
        members = members_of(sandbox.pins)
        types = {value["type"] for _, value in map_entries(sandbox.pins, "frontends")}
    name = "shop/echo"
    assert served == {
        Dialled("10.96.0.20", 80, "tcp"): Served(f"{name}:web", 0, {FAR: 1}),
        Dialled("10.96.0.20", 53, "udp"): Served(f"{name}:dns", 0, {("10.1.0.1", 5353): 1}),
        Dialled("fd00:96::20", 80, "tcp"): Served(f"{name}:web", 0, {FAR6: 1}),
        # Kubernetes keeps the families apart.
        Dialled("fd00:96::20", 53, "udp"): Served(f"{name}:dns", 0, {}),
    }
    assert {m for m in members if m.protocol == "tcp"} == {
        Member(f"{name}:web", FAR, "tcp", 1, "active"),
        Member(f"{name}:web", ("10.1.0.2", 8080), "tcp", 1, "terminating"),
        Member(f"{name}:web", FAR6, "tcp", 1, "active"),
    }
    assert types == {1}
