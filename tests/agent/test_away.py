"""What changes while no agent is there: the next one does with live sockets what is due."""

import contextlib
import errno
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

import tests.sandbox
from sockhop.agent.brake import Limits
from sockhop.agent.enforce import Enforcer
from sockhop.agent.plan import make_plan
from sockhop.agent.policies import PolicyKeeper
from sockhop.agent.target import expand, with_redirects
from sockhop.agent.terminate import Terminator, opened_terminator
from sockhop.kernel.netns import entered
from sockhop.model import Desired, Redirect
from tests.agent.test_enforce import (
    ask,
    bound_udp,
    connected_udp,
    error_of,
    of_sockets,
    redirect,
)
from tests.agent.test_policies import deny, manifest, objects
from tests.datapath import test_redirects
from tests.datapath.node import Node
from tests.datapath.rules import joined, text
from tests.sandbox import Agent, Sandbox, ServerThread, publish, wait_until

pytestmark = pytest.mark.kernel

DNS, LOCAL, BEHIND = "10.96.0.1", "127.0.1.2", "127.0.1.1"
WITHOUT_SOCK_DESTROY = f"""#!{sys.executable}
import sockhop.datapath.ending as ending
ending.has_sock_destroy = lambda: False
from sockhop.cli.main import main
main()
"""


@pytest.fixture(params=["iterator", "netlink"])
def engine(request: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """What ends sockets in the agents of a test."""
    name: str = request.param
    if name == "netlink":
        program = tmp_path / "sockhop"
        program.write_text(WITHOUT_SOCK_DESTROY)
        program.chmod(0o755)
        monkeypatch.setattr(tests.sandbox, "SOCKHOP", program)
    return name


class Away:
    """An agent that is killed, and another one that comes after a change."""

    def __init__(self, sandbox: Sandbox, engine: str, before: str) -> None:
        self.sandbox = sandbox
        self.path = sandbox.manifest(before)
        self.agent = self._start()
        assert self.agent.status()["termination"]["engine"] == engine

    def _start(self) -> Agent:
        return self.sandbox.start_agent("-f", str(self.path)).wait_ready()

    def change(self, after: str) -> None:
        """Change the manifest while nobody follows it."""
        self.agent.stop(signal.SIGKILL)
        publish(self.path, after)
        self.agent = self._start()


@pytest.fixture
def away(sandbox: Sandbox, engine: str) -> Iterator[Callable[[str], Away]]:
    made: list[Away] = []

    def start(before: str) -> Away:
        made.append(Away(sandbox, engine, before))
        return made[-1]

    yield start
    for each in made:
        assert each.agent.stop() == 0


def test_a_policy_that_came(sandbox: Sandbox, away: Callable[[str], Away]) -> None:
    with contextlib.ExitStack() as stack:
        node = away(manifest())
        other = stack.enter_context(Sandbox())
        stack.enter_context(joined(text(sandbox.cgroup)))
        allowed = stack.enter_context(connected_udp("127.0.8.1"))
        clients = []
        for place in (sandbox, other):
            with entered(place.netns):
                clients.append(stack.enter_context(connected_udp("127.0.9.1")))
        node.change(manifest(deny("127.0.9.0/24")))
        for client in clients:
            assert wait_until(lambda c=client: error_of(c), "an end") == errno.ECONNABORTED  # type: ignore[misc]
        assert error_of(allowed) == 0
        ended = wait_until(lambda: of_sockets(sandbox, 2), "events of both")
        assert {each["kind"] for each in ended} == {"severed"}


def dns(cgroup: str | None) -> str:
    """The service, with a redirect for all but *cgroup*."""
    found = redirect(cgroup) if cgroup else None
    ports = [{"port": 53, "protocol": protocol} for protocol in ("UDP", "TCP")]
    if found:
        found["spec"]["redirectFrontend"]["addressMatcher"]["toPorts"] = ports
        found["spec"]["redirectBackend"]["toPorts"] = ports
    named = [{**port, "name": str(port["protocol"]).lower()} for port in ports]
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "kube-dns", "namespace": "kube-system"},
        "spec": {"clusterIP": DNS, "ports": named},
    }
    slices = {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {
            "name": "kube-dns-1",
            "namespace": "kube-system",
            "labels": {"kubernetes.io/service-name": "kube-dns"},
        },
        "addressType": "IPv4",
        "endpoints": [{"addresses": [BEHIND]}],
        "ports": named,
    }
    return objects(service, slices, *([found] if found else []))


@pytest.fixture
def servers(sandbox: Sandbox) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for name, host in (("behind", BEHIND), ("local", LOCAL)):
            stack.enter_context(ServerThread(name, host, 53, udp=True))
            stack.enter_context(socket.create_server((host, 53)))  # connections stay in its queue
        yield


@pytest.mark.usefixtures("servers")
@pytest.mark.parametrize("comes", [True, False], ids=["came", "went"])
def test_a_redirect_that(sandbox: Sandbox, away: Callable[[str], Away], comes: bool) -> None:
    """UDP is moved, TCP is severed; the local backend's own sockets stay."""
    group = sandbox.cgroup / "cache"
    group.mkdir()
    states = [dns(None), dns(text(group))]
    before, after = states if comes else states[::-1]
    was, becomes = ("behind", "local") if comes else ("local", "behind")
    node = away(before)
    with contextlib.ExitStack() as stack:
        client = stack.enter_context(bound_udp())
        connection = stack.enter_context(socket.create_connection((DNS, 53)))
        with joined(text(group)):
            own = stack.enter_context(bound_udp())
        assert (ask(client), ask(own)) == (was, "behind")
        node.change(after)
        wait_until(lambda: ask(client) == becomes, "a socket that is moved")
        assert wait_until(lambda: error_of(connection), "an end") == errno.ECONNABORTED
        assert ask(own) == "behind"
        told = wait_until(lambda: of_sockets(sandbox, 2), "events of both")
        done = {each["protocol"]: each["kind"] for each in told}
        assert done == {"UDP": "resteered", "TCP": "severed"}
    group.rmdir()


# --- killed after a change was applied, and before the sockets were seen to ----------------------


def opened(node: Node, directory: Path) -> AbstractContextManager[Terminator]:
    """A terminator as an agent has it when it starts."""
    return opened_terminator(
        node.sandbox.pins,
        directory / "api.sock",
        node.maps,
        node.installer,
        Limits(brake=False),
        PolicyKeeper(node.balancer.policies, node.sandbox.cgroup),
    )


def moved_by_the_next(node: Node, directory: Path) -> bool:
    """Whether a socket is moved back whose redirect an agent took away before it was killed."""
    made: list[Redirect] = [test_redirects.redirect(LOCAL)]
    node.install(test_redirects.behind(), redirects=made)
    with contextlib.ExitStack() as stack:
        for name, host in (("behind", BEHIND), ("local", LOCAL)):
            stack.enter_context(ServerThread(name, host, 5353, udp=True))
        client = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        client.settimeout(5)
        client.connect((DNS, 5353))
        assert ask(client) == "local"
        desired = with_redirects(Desired((test_redirects.behind(),)))
        plan = make_plan(expand(desired, node.home), node.installer.installed)
        with opened(node, directory) as first:
            first.prepare(plan, {each.name: each for each in desired.services})
            node.installer.apply(plan)
        with opened(node, directory) as second:
            second.begin()
            second.run()
        return ask(client) == "behind"


def test_a_redirect_that_went_just_before_the_end(node: Node, tmp_path: Path) -> None:
    assert moved_by_the_next(node, tmp_path)


def test_a_mutant_that_forgets_redirects(
    node: Node, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Enforcer, "note_redirects", lambda _: None)
    assert not moved_by_the_next(node, tmp_path)


@pytest.fixture(scope="module")
def node() -> Iterator[Node]:
    with Node() as made:
        yield made


def test_who_cannot_be_moved_yet_is_moved_later(node: Node, tmp_path: Path) -> None:
    """The service behind has no backend when its redirect goes, but gets one."""
    node.install(test_redirects.behind(), redirects=[test_redirects.redirect(LOCAL)])
    with contextlib.ExitStack() as stack:
        for name, host in (("behind", BEHIND), ("local", LOCAL)):
            stack.enter_context(ServerThread(name, host, 5353, udp=True))
        client = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        client.settimeout(5)
        client.connect((DNS, 5353))
        terminator = stack.enter_context(opened(node, tmp_path))
        for backends, answer in (((), "local"), ((f"{BEHIND}:5353",), "behind")):
            desired = Desired((test_redirects.behind(backends),))
            plan = make_plan(expand(desired, node.home), node.installer.installed)
            terminator.prepare(plan, {each.name: each for each in desired.services})
            node.installer.apply(plan)
            terminator.begin()
            terminator.run()
            assert ask(client) == answer
