"""The brake for health checks: where most backends fail together, it may be the checks."""

import signal
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from sockhop.agent.client import ask_agent
from sockhop.agent.state import AgentState, HeldChange
from sockhop.agent.terminate import Terminator
from sockhop.model import BackendState, Service
from tests.agent.holding import HoldingServer, dial, ended, is_open
from tests.agent.test_orders import VIP, node, opened, plan_for, server, web
from tests.agent.test_terminate import connected, events
from tests.datapath.node import Node, backend
from tests.sandbox import Sandbox, compact, wait_until

__all__ = ["node", "server"]

pytestmark = pytest.mark.kernel

HOSTS = ("10.96.0.1", "10.96.0.2", "10.96.0.3")
ANSWERS = 9000
"""The port where backends are checked, apart from the one where they serve."""


class Doors:
    """What the checks knock at, by the backend's address; each can be shut."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self._open: dict[str, socket.socket] = {}
        for host in HOSTS:
            self.open(host)

    def open(self, host: str) -> None:
        self._open[host] = self._stack.enter_context(
            socket.create_server((host, ANSWERS), backlog=4096)
        )

    def shut(self, host: str) -> None:
        self._open.pop(host).close()


@pytest.fixture
def sandbox() -> Iterator[Sandbox]:
    with Sandbox(loopback=tuple(f"{host}/32" for host in HOSTS)) as made:
        yield made


@pytest.fixture
def doors(sandbox: Sandbox) -> Iterator[Doors]:
    with ExitStack() as stack:
        yield Doors(stack)


@pytest.fixture
def tcp(sandbox: Sandbox) -> Iterator[list[HoldingServer]]:
    with ExitStack() as stack:
        yield [stack.enter_context(HoldingServer(host, 8080)) for host in HOSTS]


def checked(servers: list[HoldingServer], intent: str) -> str:
    return compact(
        web={
            "frontends": [f"{VIP}:80"],
            "backends": [each.endpoint for each in servers],
            "health": {
                "tcp": {"port": ANSWERS}, "interval": "100ms", "timeout": "5s",
                "rise": 1, "fall": 3,
            },
            "intent": {"tcp": {"quarantined": intent}},
        }
    )  # fmt: skip


def asked(sandbox: Sandbox) -> AgentState:
    found = ask_agent(sandbox.api)
    assert found
    return found.state


def unhealthy(sandbox: Sandbox) -> int:
    return len(asked(sandbox).health.unhealthy)


def held(sandbox: Sandbox) -> list[HeldChange]:
    return asked(sandbox).termination.held


def waiting(sandbox: Sandbox) -> int:
    return sum(each.sockets for each in held(sandbox))


def test_where_most_fail_together_nothing_ends_unasked(
    sandbox: Sandbox, doors: Doors, tcp: list[HoldingServer]
) -> None:
    path = sandbox.manifest(checked(tcp, "sever"))
    with sandbox.agent(path) as agent, connected(tcp, 15) as groups:
        for host in HOSTS:
            doors.shut(host)
        wait_until(lambda: unhealthy(sandbox) == 3 and waiting(sandbox) == 15, "the brake")
        # The first may have fallen before the last one was asked.
        whys = {each.reason for each in held(sandbox)}
        assert all(why.endswith(" of 3 backends of web fail their checks") for why in whys)
        said = sandbox.sockhop("status").stdout
        assert "HELD" in said
        assert " of 3 backends of web fail their checks" in said
        assert {each["kind"] for each in events(sandbox)} == {"held"}
        # It holds across the agent's death, too.
        agent.stop(signal.SIGKILL)
        again = sandbox.start_agent("-f", str(path)).wait_ready()
        assert waiting(sandbox) == 15
        assert all(is_open(each) for group in groups for each in group)
        # Those that answer again wait no more. What is approved of ends.
        doors.open(HOSTS[0])
        wait_until(lambda: unhealthy(sandbox) == 2, "a recovery")
        wait_until(lambda: waiting(sandbox) == len(groups[1]) + len(groups[2]), "what is left")
        assert sandbox.sockhop("approve").returncode == 0
        for each in (*groups[1], *groups[2]):
            ended(each)
        assert all(is_open(each) for each in groups[0])
        again.stop()


def test_one_that_fails_alone_is_believed(
    sandbox: Sandbox, doors: Doors, tcp: list[HoldingServer]
) -> None:
    path = sandbox.manifest(checked(tcp, "sever"))
    with sandbox.agent(path), connected(tcp, 15) as groups:
        doors.shut(HOSTS[0])
        for each in groups[0]:
            ended(each)
        assert not held(sandbox)
        # Now it is most of them: the second one's connections wait.
        doors.shut(HOSTS[1])
        wait_until(lambda: waiting(sandbox) == len(groups[1]), "the brake")
        (found,) = held(sandbox)
        assert found.reason == "2 of 3 backends of web fail their checks"
        assert all(is_open(each) for each in (*groups[1], *groups[2]))


def quarantine(terminator: Terminator, node: Node, made: Service) -> None:
    plan = plan_for(node, made)
    terminator.prepare(plan, {"web": made})
    node.installer.apply(plan)
    terminator.begin()
    terminator.run()


@pytest.mark.parametrize(("brake", "doubted"), [(True, True), (True, False), (False, True)])
def test_a_doubt_holds_what_would_end(
    node: Node, server: HoldingServer, tmp_path: Path, brake: bool, doubted: bool
) -> None:
    """Without the brake, and without doubts (the mutant), it is ended at once."""
    (client,) = dial(VIP)
    quarantined = web(backend(server.endpoint, state=BackendState.QUARANTINED))
    with client, opened(node, tmp_path, brake=brake) as terminator:
        if doubted:
            terminator.doubts = lambda: {"web": "1 of 1 backends of web fail their checks"}
        quarantine(terminator, node, quarantined)
        if brake and doubted:
            assert is_open(client)
            terminator.approve()
            terminator.run()
        ended(client)
