"""`sockhop bench`: its JSON has the promised shape, peers may lack, and nothing is left behind."""

import json
import os
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from sockhop.kernel.cgroups import cgroup_root
from tests.sandbox import SOCKHOP, wait_until

pytestmark = pytest.mark.kernel

KINDS = [("connect", "TCP"), ("connect", "UDP"), ("ask", "TCP"), ("ask", "UDP")]
FORMS = {
    "one JSON file": 1,
    "one YAML file": 1,
    "a directory of JSON files": 200,
    "a directory of YAML files": 200,
}


class Bench:
    """Runs benchmarks under a name of the test's own."""

    _number = 0

    def __init__(self) -> None:
        Bench._number += 1
        pins = Path(f"/sys/fs/bpf/sockhop-test-{os.getpid()}-b{Bench._number}")
        self.name = f"{pins.name}-bench"
        self.pins = pins.with_name(self.name)
        self.cgroup = cgroup_root() / self.name
        self.files = Path("/run") / self.name
        self.environment = os.environ | {"SOCKHOP_BPFFS": str(pins)}
        self.namespaces: set[str] = set()

    def start(self, *arguments: str) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            ["env", "--default-signal=INT", str(SOCKHOP), "bench", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=self.environment,
            start_new_session=True,
            text=True,
        )

    def run(self, *arguments: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [SOCKHOP, "bench", *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            env=self.environment,
            check=False,
            timeout=120,
            text=True,
        )

    def members(self) -> list[int]:
        return [
            int(pid)
            for file in self.cgroup.glob("*/cgroup.procs")
            for pid in file.read_text().split()
        ]

    def observe(self) -> None:
        """Remember the namespaces of the rooms, to look for processes in them later."""
        found = {str(Path(f"/proc/{pid}/ns/net").readlink()) for pid in self.members()}
        self.namespaces |= found - {str(Path("/proc/self/ns/net").readlink())}

    def traces(self) -> list[str]:
        """What of the benchmark is on this machine now."""
        here = [str(path) for path in (self.pins, self.cgroup, self.files) if path.exists()]
        here += map(str, Path("/run/netns").glob(f"{self.name}-*"))
        for process in Path("/proc").glob("[0-9]*"):
            try:
                namespace = str((process / "ns/net").readlink())
            except OSError:
                continue
            if namespace in self.namespaces:
                here.append(str(process))
        return here


@pytest.fixture
def bench() -> Iterator[Bench]:
    made = Bench()
    yield made
    assert not made.traces()


def assert_spread(spread: dict[str, float]) -> None:
    assert 0 < spread["lower"] <= spread["median"] <= spread["upper"]


def assert_machine(report: dict[str, Any]) -> None:
    machine = report["machine"]
    assert machine["cpus"] == len(os.sched_getaffinity(0))
    assert machine["kernel"].startswith(os.uname().release)
    assert all(machine[key] for key in ("cpu", "sockhop", "date", "python", "memory_mib"))


def test_connect_measures_all_peers_side_by_side(bench: Bench, tmp_path: Path) -> None:
    output, plot = tmp_path / "connect.json", tmp_path / "connect.svg"
    done = bench.run("connect", "--quick", "--output", str(output), "--plot", str(plot))
    assert done.returncode == 0, done.stderr
    assert not done.stdout

    report = json.loads(output.read_text())
    assert (report["benchmark"], report["seed"], report["rounds"]) == ("connect", 1, 5)
    assert report["command"][:2] == ["bench", "connect"]
    assert report["versions"]["nft"].startswith("nftables v")
    assert report["versions"]["haproxy"].startswith("HAProxy version")
    assert_machine(report)
    assert [run["services"] for run in report["runs"]] == [1, 1000]
    for run in report["runs"]:
        assert not run["left_out"]
        assert run["dialled"] == min(run["services"], 100)
        # Its connections did go through it.
        assert run["conntrack_entries"]["nftables"] > 0
        found = {(r["operation"], r["protocol"], r["peer"]): r for r in run["results"]}
        everywhere = {"direct", "direct, again", "sockhop, not a service", "sockhop", "nftables"}
        assert set(found) == {(*kind, peer) for kind in KINDS for peer in everywhere} | {
            ("ask", "TCP", "haproxy")
        }
        for (operation, protocol, peer), result in found.items():
            assert len(result["samples"]) == 5
            for spread in ("nanoseconds", "to_direct", "to_sockhop"):
                assert_spread(result[spread])
            direct = found[operation, protocol, "direct"]["samples"]
            ratios = sorted(a / b for a, b in zip(result["samples"], direct, strict=True))
            assert result["to_direct"]["median"] == pytest.approx(ratios[2], rel=0.01), peer

    rows = [line for line in done.stderr.splitlines() if re.match(r"1(,000)? ", line)]
    assert len([row for row in rows if "–" in row]) == 2 * 21
    svg = ElementTree.fromstring(plot.read_text())
    bars = [element for element in svg.iter() if element.tag.endswith("}title")]
    assert len(bars) == 2 * (4 * 3 + 1)


def test_sync_measures_every_form(bench: Bench) -> None:
    done = bench.run("sync", "--quick")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["benchmark"], report["services"], report["backends"]) == ("sync", 200, 2000)
    assert_machine(report)
    assert {form["form"]: form["files"] for form in report["forms"]} == FORMS
    for form in report["forms"]:
        assert len(form["cold_seconds"]) == 1
        assert len(form["change_milliseconds"]) == 5
        assert min(form["cold_seconds"] + form["change_milliseconds"]) > 0
        assert 10 < form["peak_memory_mib"] < 1000
        assert 1 < form["maps_mib"] < 1000
        assert form["bytes"] > 10_000
        assert {"read", "expand", "plan", "write"} <= form["stages"].keys()
    for form in FORMS:
        assert len(re.findall(rf"^{form} +[\d. ]+$", done.stderr, re.M)) == 2


def test_peers_that_are_not_installed(bench: Bench, tmp_path: Path) -> None:
    for tool in ("sh", "ip"):
        found = subprocess.run(["which", tool], capture_output=True, check=True, text=True)
        (tmp_path / tool).symlink_to(found.stdout.strip())
    bench.environment["PATH"] = str(tmp_path)
    done = bench.run("connect", "--services", "1", "--rounds", "3")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    missing = {
        "nftables": "not installed: apt-get install nftables",
        "haproxy": "not installed: apt-get install haproxy",
    }
    assert report["runs"][0]["left_out"] == missing
    assert set(report["versions"].values()) == set(missing.values())
    assert "1 services: without nftables: not installed" in done.stderr
    assert {r["peer"] for r in report["runs"][0]["results"]} == {
        "direct", "direct, again", "sockhop, not a service", "sockhop"
    }  # fmt: skip


def test_sever(bench: Bench) -> None:
    done = bench.run("sever", "--quick", "--rounds", "2")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert [(run["sockets"], run["namespaces"], run["backends"]) for run in report["runs"]] == [
        (1000, 1, 1), (1000, 3, 1), (1000, 3, 500)
    ]  # fmt: skip
    assert report["change_sockets"] == 100
    assert_spread(report["change_milliseconds"])
    for run in report["runs"]:
        assert run["matching"] == 10
        ways = {each["way"]: each for each in run["results"]}
        assert list(ways) == [
            "ss -K in every namespace",
            "iterator in every namespace",
            "sockhop, iterator",
            "sockhop, netlink",
        ]
        assert ways.pop("ss -K in every namespace")["wrong"] == run["direct"] == 1
        for name, way in ways.items():
            assert (way["hits"], way["misses"], way["wrong"]) == (10, 0, 0), name
            assert len(way["samples"]) == 2
            assert way["milliseconds"]["lower"] <= way["milliseconds"]["upper"]
    assert not bench.traces()


@pytest.mark.parametrize(
    ("arguments", "moment", "number"),
    [
        (("connect", "--services", "1000"), "setting up", signal.SIGINT),
        (("connect", "--services", "1"), "measuring", signal.SIGINT),
        (("sync", "--services", "1000"), "measuring the stages", signal.SIGTERM),
        (("sync", "--services", "200"), "changing", signal.SIGINT),
        (("sever", "--quick"), "sockets in 3 namespaces", signal.SIGINT),
    ],
)
def test_a_signal_leaves_nothing(
    bench: Bench, arguments: tuple[str, ...], moment: str, number: signal.Signals
) -> None:
    process = bench.start(*arguments)
    assert process.stdout
    for line in process.stdout:
        if moment in line:
            break
    wait_until(bench.members, "the rooms are there")
    bench.observe()
    assert bench.traces(), "an oracle that never sees anything shows nothing"
    os.killpg(process.pid, number)  # as a terminal does
    rest, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + number, rest
    assert f"stopped by {number.name}" in rest
    assert "Traceback" not in rest
    assert "could not be removed" not in rest


def test_clears_what_a_killed_one_left(bench: Bench) -> None:
    process = bench.start("connect", "--services", "1")
    assert process.stdout
    assert any("measuring" in line for line in process.stdout)
    bench.observe()
    process.kill()
    process.communicate(timeout=60)
    assert bench.traces()
    done = bench.run("connect", "--services", "1", "--rounds", "3")
    assert done.returncode == 0, done.stderr


def test_one_at_a_time(bench: Bench) -> None:
    process = bench.start("connect", "--services", "1")
    assert process.stdout
    assert any("measuring" in line for line in process.stdout)
    second = bench.run("connect", "--quick")
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert (second.returncode, second.stderr.splitlines()[0]) == (
        3,
        "sockhop: another benchmark is running on this machine",
    )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--output", "/nowhere/connect.json"), "/nowhere/connect.json: its directory"),
        (("--services", "0"), "0 is not in the range"),
        (("--services", "200000"), "200000 is not in the range"),
    ],
)
def test_what_cannot_be(bench: Bench, arguments: tuple[str, ...], said: str) -> None:
    done = bench.run("connect", *arguments)
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr
