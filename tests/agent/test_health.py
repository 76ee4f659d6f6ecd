"""Health checks: unhealthy backends get no new connections, whatever becomes of the agent."""

import asyncio
import contextlib
import json
import resource
import signal
import socket
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import groupby
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sockhop.agent.health import HealthKeeper, Opinion, with_quarantine
from sockhop.agent.health_check import Prober, UnaskedError
from sockhop.agent.state import UnhealthyBackend
from sockhop.agent.target import Member
from sockhop.model import Backend, BackendState, Desired, Frontend, HealthCheck, Protocol, Service
from sockhop.sources.files import Loaded
from tests.sandbox import Agent, Sandbox, compact, publish, wait_until

VIP = "10.0.0.10"
FAST = {"interval": "100ms", "timeout": "5s", "rise": 2, "fall": 3}


class Backends:
    """HTTP servers by name that answer with it; what `/health` answers can be chosen."""

    def __init__(self, stack: contextlib.ExitStack, *names: str) -> None:
        self.status = dict.fromkeys(names, 200)
        self.checks: Counter[str] = Counter()
        self.endpoints: dict[str, str] = {}
        for name in names:
            server = ThreadingHTTPServer(("10.96.0.1", 0), self._handler(name))
            server.daemon_threads = True
            thread = threading.Thread(target=server.serve_forever, args=[0.01])
            thread.start()
            stack.callback(thread.join, 5)
            stack.callback(server.server_close)
            stack.callback(server.shutdown)
            self.endpoints[name] = "{}:{}".format(*server.server_address[:2])

    def _handler(self, name: str) -> type[BaseHTTPRequestHandler]:
        backends = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                is_check = self.path == "/health"
                status = backends.status[name] if is_check else 200
                backends.checks[name] += is_check
                self.send_response(status)
                if status in (301, 302):
                    self.send_header("Location", "http://192.0.2.1/")
                self.send_header("Content-Length", str(len(name)))
                self.end_headers()
                self.wfile.write(name.encode())

            def log_message(self, *_: Any) -> None:
                pass

        return Handler

    def manifest(self, **fields: Any) -> str:
        web = {
            "frontends": [f"{VIP}:80"],
            "backends": list(self.endpoints.values()),
            "health": {"http": {"path": "/health"}, **FAST},
        }
        return compact(web=web | fields)


@pytest.fixture
def backends(sandbox: Sandbox) -> Iterator[Backends]:
    with contextlib.ExitStack() as stack:
        yield Backends(stack, "one", "two")


def ask() -> str:
    with urllib.request.urlopen(f"http://{VIP}/", timeout=5) as answer:
        return str(answer.read().decode())


def asked(n: int = 30) -> set[str]:
    return {ask() for _ in range(n)}


def unhealthy(agent: Agent) -> list[str]:
    return [
        f"{found['address']}:{found['port']}" for found in agent.status()["health"]["unhealthy"]
    ]


# --- what results mean ----------------------------------------------------------------------------


@pytest.mark.unit
@given(st.lists(st.booleans(), min_size=1, max_size=60), st.integers(1, 5), st.integers(1, 5))
def test_an_opinion_turns_after_so_many_equal_results(
    results: list[bool], rise: int, fall: int
) -> None:
    """The model: a run of equal results that is long enough decides, and the very first one."""
    check, opinion = HealthCheck(rise=rise, fall=fall), Opinion()
    expected = results[0]
    turned = []
    for good, run in groupby(results):
        for length, _ in enumerate(run, 1):
            before = opinion.healthy
            turned.append(opinion.note("" if good else "refused", check))
            expected = good if length >= (rise if good else fall) else expected
            assert opinion.healthy is expected
            # Unknown counts as healthy: what turns is whether it is quarantined.
            assert turned[-1] is ((before is not False) != expected)
    if not expected:
        assert opinion.reason


def service(check: HealthCheck | None, *states: BackendState) -> Service:
    found = tuple(
        Backend(f"10.1.0.{number}", 80, state, number) for number, state in enumerate(states, 1)
    )
    frontends = (
        Frontend("10.0.0.1", 80, Protocol.TCP, port_name="http", backends=found),
        Frontend("10.0.0.1", 80, Protocol.UDP, port_name="quic", backends=found[:1]),
    )
    return Service("shop/web", frontends, health=check)


def states(desired: Desired) -> list[BackendState]:
    return [backend.state for backend in desired.services[0].frontends[0].backends]


@pytest.mark.unit
def test_only_active_backends_are_quarantined() -> None:
    known = service(None, *BackendState)
    found = [UnhealthyBackend("shop/web", f"10.1.0.{n}", 80, "refused", 0.0) for n in range(1, 5)]
    marked = with_quarantine(Desired((known,)), found)
    assert states(marked) == [BackendState.QUARANTINED, *list(BackendState)[1:]]
    assert marked.services[0].frontends[1].backends[0].state is BackendState.QUARANTINED
    other = [UnhealthyBackend("shop/other", "10.1.0.1", 80, "refused", 0.0)]
    assert with_quarantine(Desired((known,)), other).services[0] is known


@pytest.mark.unit
def test_what_is_installed_as_quarantined_stays_so_until_its_check_succeeds() -> None:
    """Across an agent's death, and across a change of the check. No check, no quarantine."""

    async def first_marks() -> None:
        check = HealthCheck(path="/")
        active = service(check, BackendState.ACTIVE, BackendState.ACTIVE)
        before = [Member("shop/web:http", "10.1.0.2", 80, Protocol.TCP)]
        keeper = HealthKeeper(lambda: None, before)
        expected = [BackendState.ACTIVE, BackendState.QUARANTINED]
        first = keeper.mark(Loaded(Desired((active,)), ()))
        assert states(first.desired) == expected
        # The same input gives the same object: an incremental change looks at nothing else.
        again = keeper.mark(Loaded(Desired((active,)), ()))
        assert again.desired.services[0] is first.desired.services[0]
        slower = service(HealthCheck(interval=9), BackendState.ACTIVE, BackendState.ACTIVE)
        assert states(keeper.mark(Loaded(Desired((slower,)), ())).desired) == expected
        unchecked = Loaded(Desired((service(None, *[BackendState.ACTIVE] * 2),)), ())
        assert keeper.mark(unchecked) is unchecked
        assert keeper.state().checked == 0
        # An agent that does not look at what is installed (the mutant) would let it serve.
        fresh = HealthKeeper(lambda: None, ()).mark(Loaded(Desired((active,)), ()))
        assert states(fresh.desired) != expected

    asyncio.run(first_marks())


@pytest.mark.unit
def test_doubts_are_about_services_of_which_most_backends_fail_now() -> None:
    """Also those that have failed once only: of many that fail together one is the first."""

    async def results() -> None:
        check = HealthCheck(fall=3)
        checked = service(check, *[BackendState.ACTIVE] * 4, BackendState.MAINTENANCE)
        keeper = HealthKeeper(lambda: None, ())
        keeper.mark(Loaded(Desired((checked,)), ()))
        opinions = list(keeper._opinions.values())
        assert len(opinions) == 4
        for opinion in opinions:
            opinion.note("", check)
        assert not keeper.doubts()
        for opinion in opinions[:2]:
            opinion.note("refused", check)
        assert not keeper.doubts()  # half of them is not most
        opinions[2].note("refused", check)
        assert keeper.doubts() == {"shop/web": "3 of 4 backends of shop/web fail their checks"}
        assert not keeper.state().unhealthy
        opinions[0].note("", check)
        assert not keeper.doubts()

    asyncio.run(results())


@pytest.mark.unit
def test_what_goes_wrong_in_a_check_is_said_and_ends_none(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Faulty(Prober):
        async def ask(self, address: str, port: int, check: HealthCheck) -> str | None:
            times.append(port)
            enough.set() if len(times) == 10 else None
            raise RuntimeError("no idea")

    times: list[int] = []
    enough = asyncio.Event()

    async def results() -> None:
        check = HealthCheck(interval=0.001)
        keeper = HealthKeeper(lambda: None, ())
        checked = service(check, BackendState.ACTIVE, BackendState.ACTIVE)
        keeper.mark(Loaded(Desired((checked,)), ()))
        prober, turns = Faulty(), asyncio.Semaphore(2)
        follow = [
            asyncio.create_task(keeper._follow(key, prober, turns)) for key in keeper._services
        ]
        await enough.wait()
        assert not any(task.done() for task in follow)
        assert keeper.state().unasked == {"RuntimeError('no idea')": 2}
        assert not keeper.state().unhealthy
        for task in follow:
            task.cancel()

    asyncio.run(results())
    assert caplog.text.count("cannot check") == 1


# --- one look -------------------------------------------------------------------------------------


@pytest.mark.kernel
def test_what_a_check_says(sandbox: Sandbox, backends: Backends) -> None:
    host, port = backends.endpoints["one"].split(":")
    http = HealthCheck(path="/health", timeout=5)

    async def look() -> None:
        async with Prober() as prober:
            for status, expected in (
                (200, ""), (299, ""), (302, ""), (399, ""),
                (400, "GET /health: 400"), (503, "GET /health: 503"),
            ):  # fmt: skip
                backends.status["one"] = status
                assert await prober.ask(host, int(port), http) == expected
            assert await prober.ask(host, int(port), HealthCheck()) == ""
            with socket.create_server((host, 0), backlog=1) as silent:
                hasty = HealthCheck(path="/health", timeout=0.3)
                found = await prober.ask(host, silent.getsockname()[1], hasty)
                assert found in ("GET /health: no answer within 0.3 s", None)  # None: we were late
                # Its queue takes a connection, and that is all that is asked.
                assert await prober.ask(host, silent.getsockname()[1], HealthCheck()) == ""
                closed = silent.getsockname()[1]
            refused = "Connection refused"
            assert await prober.ask(host, closed, http) == f"GET /health: {refused}"
            elsewhere = HealthCheck(port=closed)
            assert (
                await prober.ask(host, int(port), elsewhere)
                == f"TCP connect at port {closed}: {refused}"
            )
            found = await prober.ask("10.99.0.1", 80, http)
            assert found == "GET /health: Network is unreachable"

    asyncio.run(look())


@pytest.mark.kernel
def test_what_keeps_the_agent_from_asking_says_nothing_of_a_backend(
    sandbox: Sandbox, backends: Backends
) -> None:
    host, port = backends.endpoints["one"].split(":")

    async def look() -> None:
        async with Prober() as prober:
            assert await prober.ask(host, int(port), HealthCheck(timeout=5)) == ""
            limits = resource.getrlimit(resource.RLIMIT_NOFILE)
            resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
            try:
                for check in (HealthCheck(timeout=5), HealthCheck(path="/health", timeout=5)):
                    with pytest.raises(UnaskedError, match="Too many open files"):
                        await prober.ask(host, int(port), check)
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, limits)

    asyncio.run(look())


REPLIES = {
    b"": "closed without a whole answer",
    b"220 mail.example ESMTP\r\n\r\n": "no HTTP answer: Bad status line",
    b"HTTP/1.1 999999 \r\n\r\n": "no HTTP answer: Bad status line",
}


@pytest.mark.kernel
def test_an_answer_that_is_not_http_is_unhealthy(sandbox: Sandbox) -> None:
    replies = list(REPLIES)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked = await reader.readuntil(b"\r\n\r\n")
        writer.write(replies[int(asked[len(b"GET /")]) - ord("0")])
        writer.close()

    async def look() -> None:
        async with await asyncio.start_server(serve, "10.96.0.1", 0) as server, Prober() as prober:
            host, port = server.sockets[0].getsockname()
            for number, expected in enumerate(REPLIES.values()):
                found = await prober.ask(host, port, HealthCheck(path=f"/{number}", timeout=5))
                assert found == f"GET /{number}: {expected}"

    asyncio.run(look())


@pytest.mark.kernel
def test_an_agent_that_was_late_learns_nothing(sandbox: Sandbox) -> None:
    async def look(server: socket.socket) -> None:
        async with Prober() as prober:
            check = HealthCheck(path="/", timeout=0.1)
            host, port = server.getsockname()
            asked = asyncio.create_task(prober.ask(host, port, check))
            await asyncio.sleep(0.05)
            time.sleep(0.5)  # noqa: ASYNC251 (as a long change does)
            assert await asked is None

    with socket.create_server(("10.96.0.1", 0)) as server:
        asyncio.run(look(server))


# --- an agent -------------------------------------------------------------------------------------


@pytest.mark.kernel
def test_an_unhealthy_backend_gets_no_new_connections(sandbox: Sandbox, backends: Backends) -> None:
    path = sandbox.manifest(backends.manifest())
    host, port = backends.endpoints["one"].split(":")
    with sandbox.agent(path, "--metrics", "127.0.0.1:9464") as agent:
        assert asked() == {"one", "two"}
        with socket.create_connection((host, int(port))) as old:
            backends.status["one"] = 503
            wait_until(lambda: unhealthy(agent) == [backends.endpoints["one"]], "the finding")
            assert asked() == {"two"}
            # `quarantined` leaves what is connected alone, by default.
            old.sendall(b"GET / HTTP/1.0\r\n\r\n")
            assert b"".join(iter(lambda: old.recv(1000), b"")).endswith(b"one")
        rows = json.loads(sandbox.sockhop("get", "backends", "-o", "json").stdout)
        found = {row["backend"]: row["state"] for row in rows}
        assert found[backends.endpoints["one"]] == "quarantined"
        assert sandbox.sockhop("verify").returncode == 0
        assert sandbox.sockhop("plan", "-f", str(path)).returncode == 0
        assert "GET /health: 503" in sandbox.sockhop("status").stdout
        with urllib.request.urlopen("http://127.0.0.1:9464/metrics", timeout=5) as answer:
            metrics = answer.read().decode()
        label = f'{{backend="{backends.endpoints["one"]}",service="web"}}'
        assert f"sockhop_backend_unhealthy{label} 1.0" in metrics
        assert "sockhop_health_checked_backends 2.0" in metrics
        backends.status["one"] = 200
        wait_until(lambda: not unhealthy(agent), "the recovery")
        assert asked() == {"one", "two"}
        log = agent.log.read_text()
        assert f"unhealthy: {backends.endpoints['one']} of web: GET /health: 503" in log
        assert f"healthy again: {backends.endpoints['one']} of web" in log


@pytest.mark.kernel
def test_where_none_is_healthy(sandbox: Sandbox, backends: Backends) -> None:
    """Connects are refused at once, unless the service prefers a bad backend to none."""
    backends.status = dict.fromkeys(backends.status, 500)
    path = sandbox.manifest(backends.manifest())
    with sandbox.agent(path) as agent:
        wait_until(lambda: len(unhealthy(agent)) == 2, "both")
        with pytest.raises(OSError, match="No route to host"):
            ask()
        publish(path, backends.manifest(fallback=["quarantined"]))
        wait_until(lambda: agent.status()["generation"] > 2, "the change")
        assert asked() == {"one", "two"}
        publish(path, backends.manifest(health={"tcp": {}, **FAST}))
        wait_until(lambda: not unhealthy(agent), "the check that both pass")
        assert asked() == {"one", "two"}


@pytest.mark.kernel
def test_checks_go_on_while_a_source_is_broken(sandbox: Sandbox, backends: Backends) -> None:
    path = sandbox.manifest(backends.manifest())
    with sandbox.agent(path) as agent:
        publish(path, "services: [")
        wait_until(lambda: agent.status()["source"]["error"], "the error")
        synced = agent.status()["synced_at"]
        backends.status["one"] = 503
        wait_until(lambda: unhealthy(agent) == [backends.endpoints["one"]], "the finding")
        wait_until(lambda: asked() == {"two"}, "the quarantine")
        backends.status["one"] = 200
        wait_until(lambda: asked() == {"one", "two"}, "the recovery")
        assert agent.status()["source"]["error"]
        assert agent.status()["synced_at"] == synced


@pytest.mark.kernel
def test_an_agent_that_dies_forgets_nothing(sandbox: Sandbox, backends: Backends) -> None:
    """While a backend is unhealthy: at no moment does the next agent let it serve."""
    backends.status["one"] = 503
    # So slow that the second agent's own results would come too late.
    slow = {"http": {"path": "/health"}, "interval": "60s", "timeout": "5s"}
    path = sandbox.manifest(backends.manifest(health=slow))
    with sandbox.agent(path) as agent:
        wait_until(lambda: unhealthy(agent), "the first result")
        assert asked() == {"two"}
        agent.stop(signal.SIGKILL)
    assert asked() == {"two"}
    backends.status["one"] = 200  # a first success is not enough for what is known to be bad
    before = backends.checks["one"]
    with sandbox.agent(path) as agent:
        wait_until(lambda: backends.checks["one"] > before, "a check")
        assert asked() == {"two"}
        assert unhealthy(agent) == [backends.endpoints["one"]]
        assert "unhealthy before" in agent.status()["health"]["unhealthy"][0]["reason"]


@pytest.mark.kernel
def test_a_policy_that_forbids_the_agent_to_ask_makes_nobody_unhealthy(
    sandbox: Sandbox, backends: Backends
) -> None:
    manifest = json.loads(backends.manifest())
    denied = {"name": "nobody", "deny": [{"cidr": "10.96.0.0/16"}]}
    path = sandbox.manifest(json.dumps(manifest))
    with sandbox.agent(path, "--metrics", "127.0.0.1:9464") as agent:
        wait_until(lambda: min(backends.checks.values(), default=0) > 0, "checks")
        publish(path, json.dumps(manifest | {"policies": [denied]}))
        why = {"Operation not permitted": 2}
        wait_until(lambda: agent.status()["health"]["unasked"] == why, "the denial")
        time.sleep(5 * 0.1)
        assert not unhealthy(agent)
        assert "2 backends: the agent can't ask" in sandbox.sockhop("status").stdout
        with urllib.request.urlopen("http://127.0.0.1:9464/metrics", timeout=5) as answer:
            assert "sockhop_health_unasked_backends 2.0" in answer.read().decode()
        assert agent.log.read_text().count("cannot check ") == 1
        publish(path, json.dumps(manifest))
        wait_until(lambda: not agent.status()["health"]["unasked"], "answers")
