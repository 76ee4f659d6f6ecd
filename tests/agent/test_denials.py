"""What becomes of live sockets that a policy forbids, with the live kernel below."""

import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest

from sockhop.agent.brake import Limits
from sockhop.agent.carry_out import Reach
from sockhop.agent.denials import Denials
from sockhop.agent.events import EventKind, EventLog
from sockhop.agent.installed import read_services
from sockhop.agent.orders import now
from sockhop.agent.record import Recorder
from sockhop.datapath.ending import Outcome, choose_engine
from sockhop.datapath.resteer import Resteerer
from sockhop.datapath.sockets import Socket, Sockets
from sockhop.model import Intent, IntentKind, IntentRule, Protocol, Trigger
from tests.agent.holding import HoldingServer, dial, ended, is_open
from tests.datapath.node import Node, service
from tests.sandbox import ServerThread, wait_until

pytestmark = pytest.mark.kernel

VIP = "10.0.0.10"


def denied(kind: IntentKind, protocol: Protocol = Protocol.TCP, **times: float) -> IntentRule:
    return IntentRule(protocol, Trigger.DENIED, Intent(kind, **times))


@pytest.fixture(scope="module")
def node() -> Iterator[Node]:
    with Node() as made:
        yield made


class Stage:
    """A node with a service at VIP, and the denials of its policies."""

    def __init__(self, node: Node, stack: ExitStack, directory: Path, limits: Limits) -> None:
        self._node = node
        pins = node.sandbox.pins
        engine = stack.enter_context(choose_engine(pins))
        resteerer = stack.enter_context(Resteerer(pins))
        self._sockets = stack.enter_context(Sockets(pins))
        self.log = EventLog(directory / "api.events")

        def names() -> dict[int, str]:
            return read_services(node.maps)

        def move(sockets: Sequence[Socket]) -> Sequence[Outcome]:
            return resteerer.resteer(sockets, engine.sever_sockets)

        reach = Reach(node.maps, self._sockets, engine, move, resteerer.obstacles)
        self.rules: dict[str, tuple[IntentRule, ...]] = {}
        self.denials = Denials(
            reach,
            Recorder(self.log, names),
            limits,
            names,
            lambda name: self.rules.get(name, ()),
        )

    def deny(self, sockets: list[socket.socket], change: int = 7) -> None:
        ends = {each.getsockname()[1] for each in sockets}
        found: list[Socket] = [s for s in self._sockets.balanced() if s.local_port in ends]
        assert len(found) == len(sockets)
        self.denials.update([(each, "strict") for each in found], change)

    def run_until(self, seconds: float) -> None:
        end = now() + seconds
        while now() < end:
            time.sleep(max(min(self.denials.run(), end) - now(), 0))


@pytest.fixture
def limits() -> Limits:
    return Limits()


@pytest.fixture
def stage(node: Node, tmp_path: Path, limits: Limits) -> Iterator[Stage]:
    with ExitStack() as stack:
        yield Stage(node, stack, tmp_path, limits)


@pytest.fixture
def server(node: Node) -> Iterator[HoldingServer]:
    with HoldingServer("10.96.0.1", 8080) as made:
        node.install(service("web", f"{VIP}:80/tcp", backends=[made.endpoint]))
        yield made


def test_what_is_forbidden_ends_at_once_unless_its_service_wants_something_else(
    stage: Stage, server: HoldingServer
) -> None:
    first, second = dial(VIP, n=2)
    with first, second:
        stage.deny([first])
        stage.denials.run()
        ended(first)
        assert is_open(second)
        (event,) = stage.log.read()
        assert (event.kind, event.reason, event.change, event.intent) == (
            EventKind.SEVERED, "policy strict denies it", 7, "sever"
        )  # fmt: skip
        assert event.service == "web"
        stage.rules["web"] = (denied(IntentKind.LEAVE),)
        stage.deny([second])
        stage.denials.run()
        assert is_open(second)


def test_what_is_forbidden_can_drain(stage: Stage, server: HoldingServer) -> None:
    """What still speaks with its peer is left; so is what is not forbidden any more."""
    stage.rules["web"] = (denied(IntentKind.DRAIN, after=0.6),)
    (client,) = dial(VIP)
    with client:
        stage.deny([client])
        stage.run_until(2.2)  # looked at once
        assert is_open(client)
        stage.denials.update([], 8)
        stage.rules["web"] = (denied(IntentKind.DRAIN, after=0.6, deadline=0.8),)
        stage.deny([client])
        stage.run_until(0.5)
        stage.denials.update([], 8)
        stage.run_until(0.5)
        assert is_open(client)
        stage.deny([client])
        stage.run_until(0.5)
        stage.deny([client])  # found again: its time goes on
        stage.run_until(0.5)
        ended(client)


@pytest.mark.parametrize("limits", [Limits(approve_above=1)])
def test_too_many_wait_for_approval(stage: Stage, server: HoldingServer) -> None:
    clients = dial(VIP, n=3)
    stage.deny(clients)
    stage.denials.run()
    assert all(map(is_open, clients))
    (held,) = stage.denials.held()
    assert (held.change, held.sockets, held.what) == (7, 3, ["policy strict denies"])
    stage.denials.approve({7})
    stage.denials.run()
    for each in clients:
        ended(each)
        each.close()
    assert not stage.denials.held()


def test_forbidden_udp_can_move(node: Node, stage: Stage) -> None:
    with (
        ServerThread("one", "10.96.0.1", udp=True) as one,
        ServerThread("two", "10.96.0.1", udp=True) as two,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client,
    ):
        ends = [one.endpoint, two.endpoint]
        node.install(service("dns", f"{VIP}:53/udp", backends=ends))
        stage.rules["dns"] = (denied(IntentKind.RESTEER, Protocol.UDP),)
        client.connect((VIP, 53))
        client.settimeout(5)
        before = node.chosen(client.fileno())
        stage.deny([client])
        stage.denials.run()
        wait_until(lambda: node.chosen(client.fileno()) != before, "it to move")
        client.send(b"?")
        assert client.recv(10)
        assert [event.kind for event in stage.log.read()] == [EventKind.RESTEERED]
