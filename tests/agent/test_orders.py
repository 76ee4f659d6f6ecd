"""What waits for live sockets outlives whoever noted it, and means nothing with other maps."""

import json
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from sockhop.agent.brake import Limits
from sockhop.agent.orders import Orders, read_rules
from sockhop.agent.plan import Plan, make_plan
from sockhop.agent.policies import PolicyKeeper
from sockhop.agent.target import expand
from sockhop.agent.terminate import Terminator, opened_terminator
from sockhop.model import BackendState, Desired, Intent, IntentKind, IntentRule, Service, Trigger
from sockhop.model import Protocol as Transport
from tests.agent.holding import HoldingServer, dial, ended, is_open
from tests.datapath.node import Node, backend, service

pytestmark = pytest.mark.kernel

VIP = "10.0.0.10"
SEVER = tuple(
    IntentRule(Transport.TCP, trigger, Intent(IntentKind.SEVER))
    for trigger in (Trigger.REMOVED, Trigger.QUARANTINED)
)


@pytest.fixture(scope="module")
def node() -> Iterator[Node]:
    with Node() as made:
        yield made


@pytest.fixture
def server(node: Node) -> Iterator[HoldingServer]:
    with HoldingServer("10.96.0.1", 8080) as made:
        node.install(web(made.endpoint))
        yield made


def web(*backends: object) -> Service:
    return service("web", f"{VIP}:80/tcp", backends=backends, intents=SEVER)


def opened(
    node: Node, directory: Path, *, brake: bool = False
) -> AbstractContextManager[Terminator]:
    """A terminator as an agent has it when it starts."""
    policies = PolicyKeeper(node.balancer.policies, node.sandbox.cgroup)
    return opened_terminator(
        node.sandbox.pins,
        directory / "api.sock",
        node.maps,
        node.installer,
        Limits(brake=brake),
        policies,
    )


def plan_for(node: Node, *services: Service) -> Plan:
    return make_plan(expand(Desired(services), node.home), node.installer.installed)


def orders(node: Node, directory: Path) -> int:
    return len(Orders(directory / "api.orders", node.sandbox.pins))


@pytest.mark.parametrize("applied", [False, True])
def test_killed_after_noting_a_change(
    node: Node, server: HoldingServer, tmp_path: Path, applied: bool
) -> None:
    """Before it was applied: nothing has happened. After: the next agent carries it out."""
    (client,) = dial(VIP)
    with client:
        new = web("10.96.0.1:8081")
        plan = plan_for(node, new)
        with opened(node, tmp_path) as first:
            first.prepare(plan, {"web": new})
        assert orders(node, tmp_path) == 1
        if applied:
            node.installer.apply(plan)
        with opened(node, tmp_path) as second:
            second.begin()
            second.run()
        if applied:
            ended(client)
        else:
            assert is_open(client)
            assert orders(node, tmp_path) == 0


def test_killed_between_two_changes(node: Node, server: HoldingServer, tmp_path: Path) -> None:
    """What was noted of a state is about a backend that has gone since."""
    (client,) = dial(VIP)
    with client:
        resting = web(
            backend(server.endpoint, state=BackendState.QUARANTINED), backend("10.96.0.1:8081")
        )
        plan = plan_for(node, resting)
        with opened(node, tmp_path) as first:
            first.prepare(plan, {"web": resting})
            node.installer.apply(plan)
        left = web("10.96.0.1:8081")
        node.install(left)
        with opened(node, tmp_path) as second:
            second.prepare(plan_for(node, left), {"web": left})
            second.begin()
            second.run()
        ended(client)


def test_orders_of_other_maps_and_damaged_ones_mean_nothing(
    node: Node, server: HoldingServer, tmp_path: Path
) -> None:
    (client,) = dial(VIP)
    with client:
        new = web("10.96.0.1:8081")
        plan = plan_for(node, new)
        with opened(node, tmp_path) as first:
            first.prepare(plan, {"web": new})
            node.installer.apply(plan)
            first.begin()
        path = tmp_path / "api.orders"
        assert path.stat().st_mode & 0o777 == 0o600
        assert read_rules(path, node.sandbox.pins) == {"web": SEVER}
        good = path.read_text()
        assert orders(node, tmp_path) == 1
        old = json.dumps(json.loads(good) | {"epoch": "another boot/1"})
        for text in (old, good[:-9], "", "[]", '{"epoch": 1}'):
            path.write_text(text)
            assert orders(node, tmp_path) == 0
            assert read_rules(path, node.sandbox.pins) == {}
        path.write_text(old)
        with opened(node, tmp_path) as second:
            second.begin()
            second.run()
        assert is_open(client)


def test_a_file_that_cannot_be_written_keeps_nobody_from_working(
    node: Node, server: HoldingServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (client,) = dial(VIP)
    (tmp_path / "file").touch()
    with client, opened(node, tmp_path / "file") as terminator:
        new = web("10.96.0.1:8081")
        plan = plan_for(node, new)
        terminator.prepare(plan, {"web": new})
        node.installer.apply(plan)
        terminator.begin()
        terminator.run()
        ended(client)
    assert "a restart will forget what waits" in caplog.text
    assert "events are lost" in caplog.text
