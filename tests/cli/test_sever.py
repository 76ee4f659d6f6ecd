"""`sockhop sever` and `get sockets FILTER`: what they mean, and nothing else, in all namespaces."""

import json
import os
import socket
from collections.abc import Iterator
from typing import Any

import pytest

from sockhop.kernel.netns import entered
from tests.datapath.kinds import SERVICES, Kinds, cookie, fate, namespace, unique
from tests.datapath.node import Node

pytestmark = pytest.mark.kernel


@pytest.fixture(scope="module")
def node() -> Iterator[Node]:
    with Node() as made:
        made.install(*SERVICES)
        yield made


def rows(node: Node, *arguments: str, status: int = 0) -> list[Any]:
    result = node.sandbox.sockhop(*arguments, "-o", "json", check=False)
    assert result.returncode == status, result.stderr
    return list(json.loads(result.stdout))


def test_a_dry_run_says_what_would_be_and_does_nothing(node: Node) -> None:
    here = f"netns = {node.sandbox.name}"
    with Kinds() as kinds:
        result = node.sandbox.sockhop("sever", here, "service = a")
        assert "would be severed; nothing was done: --yes does it" in result.stderr
        actions = {line.partition("  ")[0] for line in result.stdout.splitlines()}
        assert actions == {"ACTION", "would sever"}
        found = rows(node, "sever", here, "service = a")
        assert {row["cookie"] for row in found} == {cookie(own) for own in kinds.with_a.values()}
        assert {row["action"] for row in found} == {"severed"}
        assert {(row["service"], row["name"]) for row in found} == {("a", node.sandbox.name)}
        assert all(row["processes"][0].endswith(f"/{os.getpid()}") for row in found)
        kinds.check(ended=False)


@pytest.mark.parametrize("engine", ["iterator", "netlink"])
def test_by_service_in_another_namespace(node: Node, engine: str) -> None:
    name = unique(f"sever-{engine}")
    with namespace(name) as other, Kinds() as here, entered(other), Kinds() as there:
        found = rows(node, "sever", f"netns={name} and service=a", "--yes", "--engine", engine)
        here.check(ended=False)
        there.check(ended=True)
        assert {row["action"] for row in found} == {"severed"}
        recorded = rows(node, "events")
        for own in there.with_a.values():
            event = next(each for each in recorded if each["cookie"] == cookie(own))
            assert event["kind"] == "severed"
            assert event["reason"] == f"by hand: netns={name} and service=a"


def test_what_may_not_be_ended_is_left_though_it_is_meant(node: Node) -> None:
    name = unique("left")
    with namespace(name) as other, entered(other), Kinds() as kinds:
        found = rows(node, "sever", f"netns={name}", "not service = a", "--yes")
        left = {row["why"] for row in found if row["action"] == "left"}
        assert left == {
            "TCP in LISTEN",
            "TCP in TIME-WAIT",
            "TCP in SYN-RECV",
            "UDP that is not connected",
            "no process holds it",
        }
        for part in ("listens", "unconnected", "disconnected"):
            for kind, own in kinds.spared.items():
                assert part not in kind or not fate(own), kind
        assert fate(kinds.spared["udp4 unmanaged"]) == "ECONNABORTED"


def test_raw_sockets_by_hand(node: Node) -> None:
    name = unique("raw")
    kind = (socket.AF_INET, socket.SOCK_RAW, 253)
    with namespace(name) as other, entered(other), socket.socket(*kind) as own:
        own.connect(("127.0.0.1", 0))
        result = node.sandbox.sockhop("sever", f"netns={name} protocol=raw", "--yes", check=False)
        if result.returncode:  # a kernel without CONFIG_INET_RAW_DIAG
            assert result.returncode == 3
            assert "raw_diag" in result.stderr
        else:
            assert fate(own) == "ECONNABORTED"


def test_by_process_and_cgroup(node: Node) -> None:
    here = f"netns={node.sandbox.name}"
    with Kinds() as kinds:
        mine = rows(node, "get", "sockets", f"{here} pid={os.getpid()} service=a")
        assert {row["cookie"] for row in mine} == {cookie(own) for own in kinds.with_a.values()}
        made_here = rows(node, "get", "sockets", f"{here} cgroup={node.sandbox.cgroup} service=a")
        assert len(made_here) == len(mine)
        assert not rows(node, "get", "sockets", f"{here} cgroup!={node.sandbox.cgroup} service=a")
        backend = rows(node, "get", "sockets", f"{here} backend=10.96.1.5:7000 service=b")
        assert {row["service"] for row in backend} == {"b"}
        nobody = rows(node, "get", "sockets", f"{here} pid={os.getpid()} unmanaged dport=7000")
        assert {row["unmanaged"] for row in nobody} == {True}


def test_nothing_is_meant(node: Node) -> None:
    assert rows(node, "sever", f"netns = {node.sandbox.name} service = nosuch", status=1) == []
    empty = node.sandbox.sockhop("sever", " ", "--yes", check=False)
    assert empty.returncode == 2
    assert "an empty one would mean every socket" in empty.stderr
    wrong = node.sandbox.sockhop("sever", "sevrice = a", "--yes", check=False)
    assert wrong.returncode == 2
    assert "'sevrice' is no test" in wrong.stderr


def test_without_anything_installed(node: Node) -> None:
    with Kinds() as kinds:
        own = kinds.spared["tcp4 unmanaged"]
        environment = node.sandbox.environment | {"SOCKHOP_BPFFS": "/sys/fs/bpf/sockhop-none"}
        result = node.sandbox.sockhop("sever", f"cookie={cookie(own)}", "--yes", env=environment)
        assert "1 socket severed" in result.stderr
        assert fate(own) == "ECONNABORTED"
