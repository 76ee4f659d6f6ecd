"""Intents carried out by a running agent: what ends, what moves, when, and what waits."""

import json
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from sockhop.agent.client import ask_agent
from tests.agent.holding import HoldingServer, dial, ended, is_open
from tests.sandbox import Agent, Sandbox, ServerThread, compact, publish, wait_until

pytestmark = pytest.mark.kernel

VIP = "10.0.0.10"
NAMES = ("one", "two", "three")


@pytest.fixture
def sandbox() -> Iterator[Sandbox]:
    with Sandbox(loopback=("10.96.0.1/32", "10.96.0.2/32", "10.96.0.3/32")) as made:
        yield made


@pytest.fixture
def tcp(sandbox: Sandbox) -> Iterator[list[HoldingServer]]:
    with (
        HoldingServer("10.96.0.1", 8080) as one,
        HoldingServer("10.96.0.2", 8080) as two,
        HoldingServer("10.96.0.3", 8080) as three,
    ):
        yield [one, two, three]


def web(*servers: Any, vip: str = VIP, **fields: Any) -> dict[str, Any]:
    """A service whose backends are servers, or what stands in a manifest."""
    backends = [each if isinstance(each, (str, dict)) else each.endpoint for each in servers]
    frontends = fields.pop("frontends", [f"{vip}:80"])
    return {"frontends": frontends, "backends": backends, **fields}


def events(sandbox: Sandbox) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(
        sandbox.sockhop("events", "-o", "json", check=False).stdout
    )
    return found


def by_peer(clients: list[socket.socket], server: Any) -> list[socket.socket]:
    """The clients that are connected to *server*: asked of the server's side."""
    peers = {each.getpeername() for each in server.connections}
    return [each for each in clients if each.getsockname() in peers]


def _sorted(clients: list[socket.socket], servers: list[HoldingServer]) -> list[Any] | None:
    found = [by_peer(clients, server) for server in servers]
    return found if sum(map(len, found)) == len(clients) else None


@contextmanager
def connected(servers: list[HoldingServer], n: int, vip: str = VIP) -> Iterator[list[Any]]:
    """*n* clients; yields them by server, each of which has some."""
    clients = dial(vip, n=n)
    try:
        yield wait_until(lambda: _sorted(clients, servers), "the servers to accept")
    finally:
        for each in clients:
            each.close()


def vanish(sandbox: Sandbox, address: str) -> None:
    """Make an address go: nothing that is sent to it is answered, not even refused."""
    subprocess.run(
        ["ip", "-n", sandbox.name, "addr", "del", f"{address}/32", "dev", "lo"], check=True
    )


SEVER = {"tcp": {"removed": "sever"}}


def test_only_the_sockets_of_the_service_that_a_backend_left(
    sandbox: Sandbox, tcp: list[HoldingServer]
) -> None:
    one, two, _ = tcp
    other = web(one, two, vip="10.0.0.11", intent=SEVER)
    path = sandbox.manifest(compact(web=web(one, two, intent=SEVER), other=other))
    with (
        sandbox.agent(path) as agent,
        connected(tcp, 20) as (gone, kept, _),
        connected(tcp, 10, "10.0.0.11") as others,
    ):
        assert gone
        assert kept
        begin = time.monotonic()
        publish(path, compact(web=web(two, intent=SEVER), other=other))
        for each in gone:
            ended(each)
        print(f"{len(gone)} ended after {(time.monotonic() - begin) * 1e3:.0f} ms")
        assert all(is_open(each) for each in (*kept, *others[0], *others[1]))
        (change, *done) = events(sandbox)
        assert (change["kind"], change["sockets"]) == ("change", len(gone))
        assert change["reason"] == "10.96.0.1:8080 was removed from web"
        assert {each["kind"] for each in done} == {"severed"}
        assert {each["change"] for each in done} == {agent.status()["generation"]}
        assert len({each["cookie"] for each in done}) == len(done) == len(gone)
        assert agent.status()["termination"]["done"] == {"severed": len(gone)}
        cookie = str(done[0]["cookie"])
        said = sandbox.sockhop("explain", cookie).stdout
        change = done[0]["change"]
        assert f"10.96.0.1:8080 was removed from web, sever, change {change}\n" in said
        assert f"{done[0]['local']} > 10.96.0.1:8080 TCP, gone\n" in said
        known = json.loads(sandbox.sockhop("explain", cookie, "-o", "json").stdout)
        assert known == {"cookie": done[0]["cookie"], "events": [done[0]]}
        assert sandbox.sockhop("explain", "4", check=False).returncode == 1


def test_what_becomes_of_sockets_by_default(sandbox: Sandbox, tcp: list[HoldingServer]) -> None:
    """Terminating and quarantined backends keep their connections; removed ones drain."""
    one, two, _ = tcp
    path = sandbox.manifest(compact(web=web(one, two)))
    with sandbox.agent(path) as agent, connected(tcp, 10) as (first, second, _):
        for state in ("terminating", "quarantined", "maintenance"):
            here = {"address": one.endpoint, "state": state}
            generation = agent.status()["generation"]
            publish(path, compact(web=web(here, two)))
            agent.wait_generation(generation)
        generation = agent.status()["generation"]
        publish(path, compact(web=web(two)))
        agent.wait_generation(generation)
        wait_until(lambda: agent.status()["termination"]["draining"] == len(first), "the drain")
        assert all(is_open(each) for each in (*first, *second))
        found = [(each["reason"], each["intent"]) for each in events(sandbox)]
        assert found == [
            ("10.96.0.1:8080 of web is terminating", "leave"),
            ("10.96.0.1:8080 of web is quarantined", "leave"),
            ("10.96.0.1:8080 of web is in maintenance", "leave"),
            ("10.96.0.1:8080 was removed from web", "drain 30s"),
        ]


DRAIN = {"tcp": {"removed": {"drain": "1500ms"}}}


def test_a_drain_ends_what_makes_no_progress(sandbox: Sandbox, tcp: list[HoldingServer]) -> None:
    """Idle or not, to a backend that vanished; one that is gone from its service lives on."""
    gone, alive, stays = tcp
    path = sandbox.manifest(compact(web=web(gone, alive, stays, intent=DRAIN)))
    with sandbox.agent(path, "--brake", "off"), connected(tcp, 30) as (dead, living, others):
        assert min(map(len, (dead, living, others))) > 1
        options = [each.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) for each in living]
        vanish(sandbox, gone.address)
        begin = time.monotonic()
        dead[0].send(b"never acknowledged")
        publish(path, compact(web=web(stays, intent=DRAIN)))
        for each in dead:
            ended(each)
            assert time.monotonic() - begin > 1.4
        print(f"ended after {time.monotonic() - begin:.1f} s")
        time.sleep(0.5)
        assert all(is_open(each) for each in (*living, *others))
        assert [e.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) for e in living] == options
        idle = [each.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) for each in living]
        assert set(idle) == {7200}
        # Looked at again later: the one that was alive has vanished by then.
        vanish(sandbox, alive.address)
        for each in living:
            ended(each, seconds=15)
        assert all(is_open(each) for each in others)


def test_a_deadline_ends_all(sandbox: Sandbox, tcp: list[HoldingServer]) -> None:
    intent = {"tcp": {"removed": {"drain": "500ms", "deadline": "2s"}}}
    one, two, _ = tcp
    path = sandbox.manifest(compact(web=web(one, two, intent=intent)))
    with sandbox.agent(path), connected(tcp, 10) as (first, second, _):
        begin = time.monotonic()
        publish(path, compact(web=web(two, intent=intent)))
        while time.monotonic() - begin < 1.5:
            assert all(is_open(each) for each in first)
        for each in first:
            ended(each)
        assert 1.9 < time.monotonic() - begin < 4
        assert all(is_open(each) for each in second)


@pytest.fixture
def udp(sandbox: Sandbox) -> Iterator[list[ServerThread]]:
    """Of one address: a socket can't go where it would need another source address."""
    with (
        ServerThread("one", "10.96.0.1", 5301, udp=True) as one,
        ServerThread("two", "10.96.0.1", 5302, udp=True) as two,
    ):
        yield [one, two]


def dns(*servers: Any, **fields: Any) -> dict[str, Any]:
    return web(*servers, frontends=[f"{VIP}:53/udp"], **fields)


@contextmanager
def asking(n: int) -> Iterator[list[socket.socket]]:
    """Connected UDP clients."""
    clients = [socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(n)]
    try:
        for each in clients:
            each.connect((VIP, 53))
            each.settimeout(0.3)
        yield clients
    finally:
        for each in clients:
            each.close()


def answer(each: socket.socket) -> str:
    """Who answers, "" for nobody: what is on its way when a socket moves is lost."""
    each.send(b"?")
    try:
        return each.recv(100).decode()
    except TimeoutError:
        return ""


def test_connected_udp_moves_and_waits_where_it_cannot(
    sandbox: Sandbox, udp: list[ServerThread]
) -> None:
    one, two = udp
    path = sandbox.manifest(compact(dns=dns(one, two)))
    with sandbox.agent(path, "--brake", "off") as agent, asking(20) as clients:
        ports = [each.getsockname()[1] for each in clients]
        assert {answer(each) for each in clients} == {"one", "two"}
        publish(path, compact(dns=dns({"address": one.endpoint, "state": "quarantined"}, two)))
        wait_until(lambda: {answer(each) for each in clients} == {"two"}, "all to move")
        # Nothing is left to go to: they stay where they are, and nothing is said to them.
        publish(path, compact(dns=dns()))
        wait_until(lambda: agent.status()["termination"]["parked"] == 20, "all to be parked")
        assert {answer(each) for each in clients} == {"two"}
        publish(path, compact(dns=dns(one)))
        wait_until(lambda: {answer(each) for each in clients} == {"one"}, "all to move again")
        assert [each.getsockname()[1] for each in clients] == ports
        assert agent.status()["termination"]["parked"] == 0
        kinds = [each["kind"] for each in events(sandbox)]
        assert kinds.count("parked") == 1
        assert kinds.count("resteered") > 20
        assert "severed" not in kinds


def test_nothing_moves_while_its_backend_is_the_best_there_is(
    sandbox: Sandbox, udp: list[ServerThread]
) -> None:
    """A terminating backend serves as long as no other does; then its sockets move."""
    one, two = udp
    path = sandbox.manifest(compact(dns=dns(one)))
    with sandbox.agent(path) as agent, asking(3) as clients:
        here = {"address": one.endpoint, "state": "terminating"}
        publish(path, compact(dns=dns(here)))
        agent.wait_generation(1)
        assert {answer(each) for each in clients} == {"one"}
        publish(path, compact(dns=dns(here, two)))
        wait_until(lambda: {answer(each) for each in clients} == {"two"}, "all to move")


def held(agent: Agent) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = agent.status()["termination"]["held"]
    return found


def test_the_brake_holds_when_the_source_is_emptied(
    sandbox: Sandbox, tcp: list[HoldingServer]
) -> None:
    """New connects follow the source at once, live sockets only what somebody has approved of."""
    one, two, _ = tcp
    path = sandbox.manifest(compact(web=web(one, two, intent=SEVER)))
    metrics = ["--metrics", "127.0.0.1:9464"]
    with sandbox.agent(path, *metrics) as agent, connected(tcp, 10) as (first, second, _):
        assert sandbox.sockhop("approve", check=False).returncode == 1
        publish(path, compact())
        (found,) = wait_until(lambda: held(agent), "the brake")
        assert (found["sockets"], found["change"]) == (10, 2)
        assert found["reason"] == "it removes all backends of web"
        with pytest.raises(OSError, match="unreachable"):
            dial(VIP)
        assert "sockhop_held_changes 1.0" in scrape()
        assert "sockhop_held_sockets 10.0" in scrape()
        assert "HELD" in sandbox.sockhop("status").stdout
        # It holds across the agent's death, too.
        agent.stop(signal.SIGKILL)
        again = sandbox.start_agent("-f", str(path), *metrics).wait_ready()
        assert held(again) == [found]
        time.sleep(1)
        assert all(is_open(each) for each in (*first, *second))
        assert sandbox.sockhop("approve", "7", check=False).returncode == 1
        said = sandbox.sockhop("approve", "2").stdout
        assert said == (
            "approved: change 2, 10 sockets: 10.96.0.1:8080, 10.96.0.2:8080 were removed from web "
            "(it removes all backends of web)\n"
        )
        for each in (*first, *second):
            ended(each)
        assert not held(again)
        assert [e["kind"] for e in events(sandbox)] == ["held", "approved", *["severed"] * 10]
        severed = 'sockhop_terminations_total{action="severed",protocol="tcp",trigger="removed"}'
        assert f"{severed} 10.0" in scrape()
        again.stop()
    assert sandbox.sockhop("approve", check=False).returncode == 3


def scrape() -> str:
    with urllib.request.urlopen("http://127.0.0.1:9464/metrics", timeout=5) as reply:
        return str(reply.read().decode())


def test_a_change_that_may_end_too_many_is_held(sandbox: Sandbox, tcp: list[HoldingServer]) -> None:
    one, two, three = tcp
    intent = {"tcp": {"quarantined": "sever", "removed": "sever"}}
    path = sandbox.manifest(compact(web=web(one, two, three, intent=intent)))
    with (
        sandbox.agent(path, "--approve-above", "3") as agent,
        connected(tcp, 30) as (first, second, third),
    ):
        assert len(first) > 3
        for each in second[3:]:
            each.close()
        bad = {"address": one.endpoint, "state": "quarantined"}
        publish(path, compact(web=web(bad, two, three, intent=intent)))
        (found,) = wait_until(lambda: held(agent), "the brake")
        assert found["reason"] == f"it may end {len(first)} sockets, more than 3"
        # A small one passes by.
        generation = agent.status()["generation"]
        publish(path, compact(web=web(bad, three, intent=intent)))
        agent.wait_generation(generation)
        for each in second[:3]:
            ended(each)
        assert all(is_open(each) for each in (*first, *third))
        # The reason is gone, and so is what was held.
        publish(path, compact(web=web(one, three, intent=intent)))
        wait_until(lambda: not held(agent), "nothing to be held")
        assert all(is_open(each) for each in (*first, *third))


def test_no_brake(sandbox: Sandbox, tcp: list[HoldingServer]) -> None:
    path = sandbox.manifest(compact(web=web(*tcp, intent=SEVER)))
    with sandbox.agent(path, "--brake", "off") as agent, connected(tcp, 10) as clients:
        publish(path, compact())
        for each in (*clients[0], *clients[1], *clients[2]):
            ended(each)
        assert not held(agent)


def test_what_waits_outlives_the_agent(sandbox: Sandbox, tcp: list[HoldingServer]) -> None:
    """Killed while it drains; the next one ends what the first would have ended, in time."""
    intent = {"tcp": {"removed": {"drain": "2s"}}}
    one, two, _ = tcp
    path = sandbox.manifest(compact(web=web(one, two, intent=intent)))
    agent = sandbox.start_agent("-f", str(path)).wait_ready()
    with connected(tcp, 10) as (first, second, _):
        vanish(sandbox, one.address)
        begin = time.monotonic()
        publish(path, compact(web=web(two, intent=intent)))
        agent.wait_generation(1)
        agent.stop(signal.SIGKILL)
        publish(path, compact(web=web(two)))  # what it says now is for later changes
        with sandbox.agent(path):
            for each in first:
                ended(each, 10)
                assert time.monotonic() - begin > 1.9
            assert time.monotonic() - begin < 10
            assert all(is_open(each) for each in second)


def test_a_backend_that_comes_back(sandbox: Sandbox, tcp: list[HoldingServer]) -> None:
    """Its sockets are spared, though they know it under another id; when it goes again they go."""
    intent = {"tcp": {"removed": {"drain": "500ms", "deadline": "1s"}}}
    one, two, _ = tcp
    both = compact(web=web(one, two, intent=intent))
    path = sandbox.manifest(both)
    with sandbox.agent(path) as agent, connected(tcp, 10) as (first, _, _):
        publish(path, compact(web=web(two, intent=intent)))
        # Asked without a process for it, which may take longer than the deadline.
        wait_until(lambda: (a := ask_agent(sandbox.api)) and a.state.generation > 1, "the change")
        publish(path, both)
        agent.wait_generation(2)
        time.sleep(1.5)
        assert all(is_open(each) for each in first)
        publish(path, compact(web=web(two, intent=intent)))
        for each in first:
            ended(each)
