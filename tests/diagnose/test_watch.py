"""What the agent and `doctor --watch` find by themselves: each thing once, and its end."""

import contextlib
import os
import socket
import time
from collections.abc import Iterator
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from sockhop.agent.client import ask_agent
from sockhop.agent.events import EventKind, EventLog, events_path
from sockhop.diagnose.audit import judge
from sockhop.diagnose.causes import Cause, Finding
from sockhop.diagnose.heal import heal
from sockhop.diagnose.visit import Visitor
from sockhop.diagnose.watch import Watch
from sockhop.kernel import netns
from sockhop.kernel._libbpf import lib
from sockhop.kernel.namespaces import Namespaces
from tests.diagnose.incident import incident
from tests.diagnose.invoke import sockhop
from tests.diagnose.load import Load
from tests.sandbox import Sandbox, compact, wait_until
from tests.splice.stage import Place, Stage

pytestmark = pytest.mark.kernel

RUNS = int(os.environ.get("SOCKHOP_DOCTOR_RUNS", "3"))


def ours(found: list[Finding], stage: Stage, number: int = 0) -> list[Cause]:
    """Return the causes of what concerns the stage, or the map with this id."""
    inodes = {netns.inode(stage.sandbox.netns), netns.inode(stage.other)}
    return sorted(
        each.cause
        for each in found
        if each.netns in inodes or (number and f"map {number} " in each.because)
    )


def test_the_incident_is_found_once_and_its_end() -> None:
    both = [Cause.HALF_SPLICED, Cause.STALE_ENTRY]
    with incident() as at, Watch() as watch:
        number = at.map.info.id
        assert ours(watch.look().begun, at.stage, number) == []
        at.stuck(Place.VETH4)
        begun = ours(watch.look().begun, at.stage, number)
        assert Cause.STALE_ENTRY not in begun
        begun += ours(watch.look().begun, at.stage, number)
        assert sorted(begun) == both
        again = watch.look()
        assert (ours(again.begun, at.stage, number), ours(again.over, at.stage, number)) == ([], [])
        (entry,) = (
            each
            for each in watch.findings.values()
            if each.cause is Cause.STALE_ENTRY and f"map {number} " in each.because
        )
        assert f"/{os.getpid()}" in "".join(entry.processes)
        heal([at.audit()], lose_unread=True)
        assert ours(watch.look().over, at.stage, number) == both
        assert ours(list(watch.findings.values()), at.stage, number) == []


def test_a_pair_without_a_stale_entry_is_found_once_and_its_end() -> None:
    """Two namespaces use the same addresses, and one map; in one an end is not in it."""
    with incident() as at, Watch() as watch:
        client, _ = at.connect(Place.LOOPBACK4, at.listen(Place.LOOPBACK4))
        here, there = client.getsockname(), client.getpeername()
        (key,) = (each.key for each in at.audit(0).look.all() if each.ends.local_port == here[1])
        assert lib.bpf_map_delete_elem(at.map.fd, key) == 0
        with netns.entered(at.stage.other), socket.create_server(there) as listener:
            other = socket.create_connection(there, source_address=here)
            at.keep(other, listener.accept()[0])
        other.sendall(b"request")
        # In each of the two, one end finds the other namespace's socket under its peer's key.
        assert ours(watch.look().begun, at.stage) == [Cause.HALF_SPLICED] * 2
        # Only now and then all connections are looked at without a stale entry.
        for _ in range(3):
            assert ours(watch.look().over, at.stage) == []
        other.close()
        assert ours(watch.look().over, at.stage) == [Cause.HALF_SPLICED] * 2


def test_a_full_queue_is_found_and_its_end() -> None:
    with Stage(spliced=False) as stage, contextlib.ExitStack() as stack, Watch() as watch:
        listener = stack.enter_context(stage.listen(Place.VETH4))
        listener.listen(0)
        watch.look()
        for _ in range(3):
            client = stack.enter_context(stage.client(Place.VETH4))
            client.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                client.connect(listener.getsockname())
        where = f"10.77.0.1:{listener.getsockname()[1]}"
        found = wait_until(
            lambda: [each for each in watch.look().begun if each.local == where], "the finding"
        )
        assert found[0].cause is Cause.NOT_ACCEPTING
        assert "1 of 1 places of its queue are taken" in found[0].because
        assert f"/{os.getpid()} does not call accept()" in found[0].because
        listener.setblocking(False)

        def over() -> list[Finding]:
            """Take all that wait: the kernel goes on asking for those that it has dropped."""
            with contextlib.suppress(BlockingIOError):
                while True:
                    stack.enter_context(listener.accept()[0])
            return [each for each in watch.look().over if each.local == where]

        (ended,) = wait_until(over, "its end")
        assert (ended.cause, ended.since) == (Cause.NOT_ACCEPTING, found[0].since)


@pytest.mark.parametrize("spliced", [True, False], ids=["ours", "by tuple"])
def test_a_healthy_node_under_load(spliced: bool) -> None:
    with contextlib.ExitStack() as stack:
        number = 0
        if spliced:
            stage = stack.enter_context(Stage())
        else:
            at = stack.enter_context(incident())
            stage, number = at.stage, at.map.info.id
        watch = stack.enter_context(Watch())
        load = stack.enter_context(Load(stage))
        for _ in range(RUNS):
            assert ours(watch.look().begun, stage, number) == []
            time.sleep(0.05)
        assert load.count


def test_without_a_second_look_what_is_being_closed_is_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The mutant: what one look has seen counts."""

    def hasty(_: Any, last: Any) -> Any:
        return judge(last.stale, last)

    monkeypatch.setattr("sockhop.diagnose.watch.judge", hasty)
    with incident() as at, Watch() as watch:
        listener = at.listen(Place.LOOPBACK4)
        old, _ = at.leave_stale(Place.LOOPBACK4, listener)
        assert ours(watch.look().begun, at.stage, at.map.info.id) == [Cause.STALE_ENTRY]
        old.close()


@pytest.mark.parametrize("hasty", [False, True])
def test_a_pair_that_is_over_by_the_second_look(
    monkeypatch: pytest.MonkeyPatch, hasty: bool
) -> None:
    """With the mutant, which looks at the ends only once, it is found."""
    with incident() as at, Watch() as watch:
        *_, client, _ = at.stuck(Place.VETH4)
        clock = SimpleNamespace(time=time.time, sleep=lambda _: client.close())
        monkeypatch.setattr("sockhop.diagnose.watch.time", clock)
        if hasty:
            monkeypatch.setattr(Visitor, "ends", cache(Visitor.ends))
            monkeypatch.setattr(Namespaces, "all", lambda each: tuple(_all(each)))
        found = ours(watch.look().begun, at.stage)
        assert found == ([Cause.HALF_SPLICED] if hasty else [])


_all = Namespaces.all


def metric(port: int, name: str, cause: str) -> float:
    with socket.create_connection(("127.0.0.1", port), timeout=5) as client:
        client.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
        text = b"".join(iter(lambda: client.recv(1 << 16), b"")).partition(b"\r\n\r\n")[2].decode()
    return next(
        sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == name and sample.labels == {"cause": cause}
    )


@contextlib.contextmanager
def agent(sandbox: Sandbox, port: int) -> Iterator[Any]:
    manifest = sandbox.manifest(compact(web={"frontends": ["10.96.0.1:80"], "backends": []}))
    options = ("--watch-every", "200ms", "--metrics", f"127.0.0.1:{port}")
    with sandbox.agent(manifest, *options) as running:
        yield running


def test_the_agent_tells() -> None:
    with incident() as at, agent(at.stage.sandbox, 9464):
        sandbox, name = at.stage.sandbox, f"map {at.map.info.id} "
        at.stuck(Place.VETH4)

        def told(kind: EventKind) -> list[str]:
            log = EventLog(events_path(sandbox.api))
            return [each.reason for each in log.read() if each.kind is kind and name in each.reason]

        wait_until(lambda: len(told(EventKind.FOUND)) == 2, "both findings")
        state = ask_agent(sandbox.api)
        assert state
        assert len(state.state.watch.findings) >= 2
        assert 0 < state.state.watch.seconds < 1
        text = sockhop(sandbox, "status").stdout
        assert "FOUND" in text
        assert "half-spliced pair: " in text
        assert metric(9464, "sockhop_findings", "half-spliced pair") >= 1
        assert metric(9464, "sockhop_found_total", "stale sockmap entry") >= 1
        heal([at.audit()], lose_unread=True)
        wait_until(lambda: len(told(EventKind.OVER)) == 2, "the end of both")
        assert len(told(EventKind.FOUND)) == 2
        assert "half-spliced pair: " in sockhop(sandbox, "events").stdout


def test_the_command() -> None:
    with incident() as at:
        at.stuck(Place.VETH4)
        options = ("--watch", "--every", "100ms", "--looks", "3")
        done = at.stage.sandbox.sockhop("doctor", *options, check=False)
        assert done.returncode == 1
        assert f"found: stale sockmap entry: map {at.map.info.id} " in done.stdout
        assert "found tcp 10.77.0.1:" in done.stdout
        wrong = sockhop(at.stage.sandbox, "doctor", "10.0.0.1:80", "--watch")
        assert (wrong.returncode, "no address goes with it" in wrong.stderr) == (2, True)
        wrong = sockhop(at.stage.sandbox, "doctor")
        assert (wrong.returncode, "which address?" in wrong.stderr) == (2, True)
