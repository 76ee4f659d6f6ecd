"""Ending sockets where storage was refused, the index was full, a method fails, all is moving."""

import contextlib
import errno
import logging
import os
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from sockhop.agent.installed import read_services
from sockhop.datapath import ending
from sockhop.datapath.end_by_iterator import IteratorMethod
from sockhop.datapath.end_by_netlink import NetlinkMethod
from sockhop.datapath.ending import Action, Engine, EngineName, choose_engine
from sockhop.datapath.listing import Listing
from sockhop.datapath.records import Setting, Total
from sockhop.datapath.sockets import Pair
from sockhop.errors import SystemLackError
from sockhop.kernel.netns import entered
from sockhop.kernel.probe import Lack, Prober
from sockhop.kernel.syscall import KernelError
from tests.datapath.kinds import SERVICES, Kinds, cookie, fate, namespace, unique
from tests.datapath.node import Node
from tests.mutants import mutant

pytestmark = pytest.mark.kernel

PASSES = int(os.environ.get("SOCKHOP_SEVERINGS", "3"))
"""Long campaigns set it, see script/soak."""


@pytest.fixture(params=["iterator", "netlink"])
def engine(node: Node, request: pytest.FixtureRequest) -> Iterator[Engine]:
    with choose_engine(node.sandbox.pins, EngineName(request.param)) as chosen:
        yield chosen


def pairs_of(node: Node, service: str) -> set[Pair]:
    names = read_services(node.maps)
    records = node.maps.backends.items()
    return {Pair(r.service, number) for number, r in records if names[r.service] == service}


@contextlib.contextmanager
def without_storage() -> Iterator[None]:
    setting = Path("/proc/sys/net/core/optmem_max")
    before = setting.read_text()
    setting.write_text("0")
    try:
        yield
    finally:
        setting.write_text(before)


@pytest.mark.parametrize("known", [True, False], ids=["backend installed", "backend gone"])
def test_sockets_whose_storage_was_refused(node: Node, engine: Engine, known: bool) -> None:
    node.install(*SERVICES)
    doomed = pairs_of(node, "a")
    with without_storage():
        kinds = Kinds()
    with kinds:
        assert node.maps.setting(Setting.FALLBACK)
        if not known:
            node.install(*SERVICES[1:])
        outcomes = engine.sever_pairs(doomed)
        kinds.check(ended=True)
        assert {s.socket.cookie for s in outcomes} == {cookie(o) for o in kinds.with_a.values()}


def test_an_index_that_was_full(node: Node, engine: Engine) -> None:
    node.install(*SERVICES)
    name = unique("full")
    with namespace(name) as other, entered(other), Kinds() as kinds:
        node.maps.live.delete_many(node.maps.live.keys())
        assert not engine.sever_pairs(pairs_of(node, "a"))
        node.maps.totals.set(Total.LIVE_FULL, 1)
        try:
            engine.sever_pairs(pairs_of(node, "a"))
        finally:
            node.maps.totals.set(Total.LIVE_FULL, 0)
        kinds.check(ended=True)


def test_a_failure_of_one_method_falls_to_the_next_and_is_counted(
    node: Node, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    node.install(*SERVICES)
    pins = node.sandbox.pins
    # The verifier wants the pointer that the kernel gave.
    untrusted = ("bpf_sock_destroy(trusted)", "bpf_sock_destroy(&sk->__sk_common)")
    broken = IteratorMethod(pins, path=mutant(tmp_path, "sever", untrusted))
    with Engine(pins, [broken, NetlinkMethod(pins)]) as engine, Kinds() as kinds:
        with caplog.at_level(logging.WARNING):
            engine.sever_pairs(pairs_of(node, "a"))
        kinds.check(ended=True)
        assert engine.failures["iterator"] >= 1
        assert "ending sockets by iterator failed, now by netlink: loading sever" in caplog.text


def test_a_kernel_without_the_kfunc(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    def lack(_: Prober) -> None:
        raise Lack(0, "no")

    monkeypatch.setattr(Prober, "sock_destroy", lack)
    node.install(*SERVICES)
    pins = node.sandbox.pins
    with choose_engine(pins) as automatic:
        assert automatic.name == "netlink"
    with Kinds() as kinds, choose_engine(pins, EngineName.ITERATOR) as named:
        with pytest.raises(SystemLackError, match="no bpf_sock_destroy"):
            named.sever_pairs(pairs_of(node, "a"))
        kinds.check(ended=False)


def test_sockets_of_a_namespace_that_is_gone(node: Node, engine: Engine) -> None:
    node.install(*SERVICES)
    with namespace(unique("gone")) as other, entered(other), Kinds() as kinds:
        with Listing(node.sandbox.pins) as listing:
            listed = [s for s in listing.here() if s.pair in pairs_of(node, "a")]
        assert len(listed) == len(kinds.with_a)
    moved = [each._replace(netns=1) for each in listed]
    outcomes = engine.sever_sockets(moved)
    assert {(each.action, each.reason) for each in outcomes} == {
        (Action.GONE, "its namespace is gone")
    }


@pytest.fixture
def orphans(node: Node) -> Iterator[list[socket.socket]]:
    """Sockets at a, in a namespace that nothing else holds."""
    node.install(*SERVICES)
    with contextlib.ExitStack() as stack:
        with namespace(unique("orphans")) as other, entered(other):
            stack.enter_context(socket.create_server(("10.96.1.5", 7000)))
            made = dial(stack, "10.9.0.1", 2)
        yield made


def test_a_namespace_that_only_sockets_hold(
    node: Node, engine: Engine, orphans: list[socket.socket]
) -> None:
    outcomes = engine.sever_pairs(pairs_of(node, "a"))
    assert [fate(own) for own in orphans] == ["ECONNABORTED"] * 4
    assert {each.action for each in outcomes} == {Action.SEVERED}


def test_by_name_in_a_namespace_that_only_sockets_hold(
    node: Node, engine: Engine, orphans: list[socket.socket]
) -> None:
    with Listing(node.sandbox.pins) as listing:
        wanted = [s for s in listing.remembered() if s.cookie in map(cookie, orphans)]
    outcomes = engine.sever_sockets(wanted)
    assert [fate(own) for own in orphans] == ["ECONNABORTED"] * 4
    assert len(outcomes) == 4


def test_a_namespace_that_cannot_be_entered(
    node: Node,
    engine: Engine,
    orphans: list[socket.socket],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(_: object) -> None:
        raise KernelError("duplicating a socket", errno.EPERM)

    monkeypatch.setattr(ending, "borrowed", refuse)
    outcomes = engine.sever_pairs(pairs_of(node, "a"))
    assert not any(map(fate, orphans))
    assert {(each.action, each.reason) for each in outcomes} == {
        (Action.REFUSED, "its network namespace cannot be entered")
    }
    assert len(outcomes) == 4


# --- under churn ---------------------------------------------------------------------------------

CHURN = """
import itertools, socket, struct
kept = []
for number in itertools.count():
    kind = (socket.SOCK_STREAM, socket.SOCK_DGRAM)[number % 2]
    own = socket.socket(socket.AF_INET, kind)
    own.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    try:
        own.connect((("10.9.0.2", 80), ("10.96.1.5", 7000))[number // 2 % 2])
    except OSError:
        pass
    kept.append(own)
    if len(kept) > 50:
        kept.pop(number * 7 % 50).close()
"""


@contextlib.contextmanager
def churning(processes: int = 2) -> Iterator[None]:
    running = [subprocess.Popen([sys.executable, "-c", CHURN]) for _ in range(processes)]
    try:
        yield
        assert [each.poll() for each in running] == [None] * processes
    finally:
        for each in running:
            each.kill()
            each.wait()


@contextlib.contextmanager
def serving() -> Iterator[None]:
    code = (
        "import socket\ns = socket.create_server(('10.96.1.5', 7000), backlog=4096)\n"
        "print('ready', flush=True)\nkept = []\nwhile True:\n    kept.append(s.accept()[0])\n"
        "    del kept[:-2000]\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as server:
        assert server.stdout
        assert server.stdout.readline() == b"ready\n"
        try:
            yield
        finally:
            server.kill()


def dial(stack: contextlib.ExitStack, host: str, number: int) -> list[socket.socket]:
    found = []
    for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
        for _ in range(number):
            own = stack.enter_context(socket.socket(socket.AF_INET, kind))
            # No TIME-WAIT, which would use up the ports of a long run.
            own.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            own.connect((host, 80))
            found.append(own)
    return found


def test_while_sockets_come_and_go(node: Node, engine: Engine) -> None:
    node.install(*SERVICES)
    with serving(), churning():
        for _ in range(PASSES):
            node.install(*SERVICES)
            with contextlib.ExitStack() as stack:
                doomed, spared = dial(stack, "10.9.0.1", 200), dial(stack, "10.9.0.2", 100)
                pairs = pairs_of(node, "a")
                node.install(*SERVICES[1:])
                begin = time.monotonic()
                outcomes = engine.sever_pairs(pairs)
                took = time.monotonic() - begin
                assert {fate(own) for own in doomed} == {"ECONNABORTED"}
                assert not any(map(fate, spared))
                assert len(outcomes) == len(doomed)
                assert took < 5
