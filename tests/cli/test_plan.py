"""`sockhop plan` says what an agent would change, and changes nothing."""

import json
import os
import socket
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.agent.holding import HoldingServer, dial
from tests.clients import bpftool
from tests.sandbox import SOCKHOP, Sandbox, compact, publish

pytestmark = pytest.mark.kernel

WEB = {
    "frontends": ["10.96.0.10:80/tcp+udp"],
    "backends": ["10.1.0.2:80", {"address": "10.1.0.3:80", "weight": 0}],
}
LOCAL = {"frontends": ["10.96.0.11:80"], "backends": ["127.0.0.1:7001"]}
SMALL = ("frontends=64", "slots=8", "tables=64", "backends=64", "services=64", "live=64")
SIZES = [argument for size in SMALL for argument in ("--map-size", size)]


@pytest.fixture(scope="module")
def node() -> Iterator[Sandbox]:
    with Sandbox() as made, made.agent(made.manifest(compact(web=WEB, local=LOCAL)), *SIZES):
        yield made


def plan(sandbox: Sandbox, text: str, *arguments: str) -> Any:
    """Run `sockhop plan` with a manifest that the agent does not follow."""
    path = sandbox.directory / "planned.yaml"
    publish(path, text)
    return sandbox.sockhop("plan", "-f", str(path), *arguments, check=False)


def dump(pins: Path) -> dict[str, Any]:
    """All that the pinned maps hold, but the storage of sockets."""
    kinds = {pin.name: bpftool.bpftool("map", "show", "pinned", str(pin))["type"]
             for pin in (pins / "maps").iterdir()}  # fmt: skip
    return {
        name: bpftool.bpftool("map", "dump", "pinned", str(pins / "maps" / name))
        for name, kind in kinds.items()
        if kind != "sk_storage"
    }


def test_nothing_to_do(node: Sandbox) -> None:
    result = plan(node, compact(web=WEB, local=LOCAL))
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith("nothing to do\n")
    shown = json.loads(plan(node, compact(web=WEB, local=LOCAL), "-o", "json").stdout)
    assert (shown["frontends"], shown["backends"]) == ([], [])
    used = {row["map"]: (row["used"], row["needed"], row["size"]) for row in shown["maps"]}
    for name in ("frontends", "slots", "backends", "services"):
        entries = len(bpftool.map_entries(node.pins, name))
        size = bpftool.bpftool("map", "show", "pinned", str(node.pins / "maps" / name))
        assert used[name] == (entries, entries, size["max_entries"]), name


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        (compact(web=WEB), [r"- local 10.96.0.11:80/tcp (elsewhere)",
                            r"- local 10.96.0.11:80/tcp (netns {netns})"]),
        (compact(web=WEB, local=LOCAL, new={"frontends": ["[fd00::1]:53/udp"], "backends": []}),
         ["+ new [fd00::1]:53/udp: 0 backends"]),
        (compact(web=WEB | {"algorithm": "least-connections"}, local=LOCAL),
         ["~ web 10.96.0.10:80/tcp: 1 backend: least-connections",
          "~ web 10.96.0.10:80/udp: 1 backend: least-connections"]),
        (compact(web=WEB | {"backends": ["10.1.0.2:80", "10.1.0.3:80"]}, local=LOCAL),
         ["~ web 10.96.0.10:80/tcp: 2 backends: +10.1.0.3:80",
          "~ web 10.96.0.10:80/udp: 2 backends: +10.1.0.3:80"]),
        (compact(web=WEB | {"sessionAffinity": {"clientIP": {"timeout": "3h"}}}, local=LOCAL),
         ["~ web 10.96.0.10:80/tcp: affinity 10800 s",
          "~ web 10.96.0.10:80/udp: affinity 10800 s"]),
        (compact(web=WEB | {"reserve": True}, local=LOCAL),
         ["~ web 10.96.0.10:80/tcp: reserved",
          "~ web 10.96.0.10:80/udp: reserved"]),
        # No frontend serves other than before, but what `get backends` shows differs.
        (compact(web=WEB | {"backends": ["10.1.0.2:80"]}, local=LOCAL),
         ["- web backend 10.1.0.3:80/tcp: active, weight 0",
          "- web backend 10.1.0.3:80/udp: active, weight 0"]),
    ],
    ids=["removed", "added", "algorithm", "backend", "affinity", "reserve", "idle-backend"],
)  # fmt: skip
def test_each_change_is_a_line_and_nothing_is_written(
    node: Sandbox, text: str, lines: list[str]
) -> None:
    before = dump(node.pins)
    result = plan(node, text)
    assert (result.returncode, result.stderr) == (1, "")
    netns = Path("/proc/thread-self/ns/net").stat().st_ino
    said = result.stdout.partition("\n\n")[0].splitlines()
    assert sorted(said) == sorted(line.format(netns=netns) for line in lines)
    shown = json.loads(plan(node, text, "-o", "json").stdout)
    assert len(shown["frontends"]) + sum(not b["serves"] for b in shown["backends"]) == len(lines)
    assert yaml.safe_load(plan(node, text, "-o", "yaml").stdout) == shown
    assert dump(node.pins) == before


def test_the_comparison_would_notice_a_write(node: Sandbox) -> None:
    before = dump(node.pins)
    node.sockhop("bypass", "on")
    try:
        assert dump(node.pins) != before
    finally:
        node.sockhop("bypass", "off")
    assert dump(node.pins) == before


def test_loopback_is_local_to_the_agent_wherever_plan_runs(node: Sandbox) -> None:
    path = node.directory / "planned.yaml"
    publish(path, compact(web=WEB, local=LOCAL))
    ran = subprocess.run(
        ["unshare", "--net", SOCKHOP, "plan", "-f", path],
        env=node.environment, capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert (ran.returncode, ran.stdout.splitlines()[0]) == (0, "nothing to do")


@pytest.mark.parametrize(("backends", "status"), [(2, 1), (3, 3)])
def test_capacity(node: Sandbox, backends: int, status: int) -> None:
    """2 + 1 slots are used; a flip of tcp and udp to n backends needs 2n more, of 8."""
    before = dump(node.pins)
    web = WEB | {"backends": [f"10.1.0.{i}:80" for i in range(2, 2 + backends)]}
    text = compact(web=web, local=LOCAL)
    result = plan(node, text)
    assert (result.returncode, "map slots has room for 8" in result.stderr) == (status, status == 3)
    assert f"web 10.96.0.10:80/tcp: {backends} backends" in result.stdout
    shown = json.loads(plan(node, text, "-o", "json").stdout)
    slots = next(row for row in shown["maps"] if row["map"] == "slots")
    assert slots == {"map": "slots", "used": 3, "needed": 3 + 2 * backends, "size": 8}
    assert dump(node.pins) == before


def test_bad_input(node: Sandbox) -> None:
    result = plan(node, "version: 1\nservices: [{name: web, backends: [nonsense]}]")
    assert (result.returncode, result.stdout) == (2, "")
    assert "planned.yaml:2" in result.stderr
    missing = node.sockhop("plan", "-f", "/no/such/file", check=False)
    assert (missing.returncode, "/no/such/file" in missing.stderr) == (2, True)
    assert node.sockhop("plan", check=False).returncode == 2


def test_what_is_ignored_is_said(node: Sandbox) -> None:
    mixed = WEB | {"backends": ["[fd00::1]:80"]}
    result = plan(node, compact(web=mixed, local=LOCAL))
    assert result.returncode == 1
    assert "has no backend: IPv6 ones cannot serve an IPv4 frontend" in result.stderr


def test_against_nothing(sandbox: Sandbox) -> None:
    result = plan(sandbox, compact(web=WEB))
    assert result.returncode == 1
    assert result.stdout.splitlines()[:2] == [
        "+ web 10.96.0.10:80/tcp: 1 backend",
        "+ web 10.96.0.10:80/udp: 1 backend",
    ]
    shown = json.loads(plan(sandbox, compact(web=WEB), "-o", "json").stdout)
    assert {row["map"]: row["size"] for row in shown["maps"]}["frontends"] == 131072
    assert not sandbox.pins.exists()
    # What was planned is what the agent then does; it needs no agent to see that.
    with sandbox.agent(sandbox.manifest(compact(web=WEB))):
        pass
    assert plan(sandbox, compact(web=WEB)).returncode == 0


def test_the_live_sockets_of_a_change() -> None:
    """Counted by backend, process and network namespace, with what becomes of them."""
    intent = {"tcp": {"removed": {"drain": "5s"}}, "udp": {"removed": "sever"}}
    vip = "10.96.0.10"
    with (
        Sandbox(loopback=("10.96.0.1/32",)) as sandbox,
        HoldingServer("10.96.0.1", 8080) as server,
        ExitStack() as clients,
    ):
        web = {"frontends": [f"{vip}:80/tcp+udp"], "backends": [server.endpoint], "intent": intent}
        path = sandbox.manifest(compact(web=web, other={**web, "frontends": [f"{vip}:81/tcp"]}))
        with sandbox.agent(path):
            for each in (*dial(vip, n=3), *dial(vip, 81)):
                clients.enter_context(each)
            datagrams = clients.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
            datagrams.connect((vip, 80))
            elsewhere = {**web, "backends": ["10.96.0.1:8081"]}
            elsewhere.pop("intent")
            other = {**web, "frontends": [f"{vip}:81/tcp"]}
            resting = [{"address": server.endpoint, "state": "maintenance"}, "10.96.0.1:8081"]
            new = compact(web={**elsewhere, "intent": intent}, other={**other, "backends": resting})
            shown = json.loads(plan(sandbox, new, "-o", "json").stdout)["sockets"]
            me = [f"{Path('/proc/self/comm').read_text().strip()}/{os.getpid()}"]
            assert {each["netns"] for each in shown["groups"]} == {sandbox.netns.stat().st_ino}
            assert all(each["processes"] == me for each in shown["groups"])
            kinds = [(e["intent"], e["trigger"], e["service"], e["protocol"], e["sockets"])
                     for e in shown["groups"]]  # fmt: skip
            assert kinds == [
                ("drain 5s", "removed", "web", "TCP", 3),
                ("leave", "maintenance", "other", "TCP", 1),
                ("sever", "removed", "web", "UDP", 1),
            ]
            assert shown["held"] == ""
            # What a service that goes has said holds, and the brake would.
            lines = plan(sandbox, compact(other=other)).stdout.splitlines()
            assert "live sockets: drain 3, sever 1" in lines
            assert "held until `sockhop approve`: it removes all backends of web" in lines
