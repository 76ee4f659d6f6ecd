"""What bpftool finds in the pinned maps is what the manifest says: no codec of ours is asked."""

import signal
from typing import Any

import pytest

from tests.clients.bpftool import map_entries
from tests.clients.oracle import (
    ABSENT,
    SCOPED,
    STATES,
    Dialled,
    Member,
    Served,
    assert_served,
    dump,
    members_of,
    served_of,
)
from tests.sandbox import Sandbox, compact

pytestmark = pytest.mark.kernel

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
