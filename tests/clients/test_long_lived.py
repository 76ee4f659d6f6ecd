"""Clients that keep their sockets for long, while backends go: the agent moves or ends them."""

import contextlib
import json
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import redis

from tests.clients import resolvers, servers
from tests.clients.resolvers import Front
from tests.clients.servers import Pair
from tests.sandbox import Sandbox, compact, wait_until

pytestmark = pytest.mark.kernel

DNS, DATABASE, CACHE = "10.96.0.53", "10.96.0.70", "10.96.0.71"
NAMES = 1000
DRAIN = 2  # s


@pytest.fixture(scope="module")
def node() -> Iterator[Sandbox]:
    with Sandbox() as made:
        yield made


def service(protocol: str, frontend: str, pair: Pair, *names: str) -> str:
    """Return a manifest with the servers that have these names."""
    fields = {
        "frontends": [f"{frontend}/{protocol}"],
        "backends": [f"127.0.0.1:{pair.ports[name]}" for name in names],
        "intent": {"tcp": {"removed": {"drain": f"{DRAIN}s"}}},
    }
    return compact(kept=fields)


def sockets(node: Sandbox) -> list[dict[str, Any]]:
    return json.loads(node.sockhop("get", "sockets", "-o", "json").stdout)  # type: ignore[no-any-return]


def metric(name: str) -> float:
    """Return a metric of the agent, 0 where it is not there."""
    with urllib.request.urlopen("http://127.0.0.1:9464/metrics", timeout=5) as answer:
        lines = answer.read().decode().splitlines()
    found = (line.rpartition(" ") for line in lines)
    return next((float(value) for key, _, value in found if key == name), 0)


# --- UDP: the same socket, another backend --------------------------------------------------------


FRONTS = {
    "nginx": (resolvers.nginx_front, resolvers.ask_nginx),
    "dnsmasq": (resolvers.dnsmasq_front, resolvers.ask_dns),
    "unbound": (resolvers.unbound_front, resolvers.ask_dns),
}


@pytest.fixture(scope="module")
def dns(node: Sandbox) -> Iterator[Pair]:
    with servers.dnsmasqs(5300) as pair:
        yield pair


def resolve(front: Front, ask: Callable[[int, str], bool], names: range) -> None:
    for number in names:
        begin = time.monotonic()
        assert ask(front.port, f"n{number}.any.test")
        assert time.monotonic() - begin < 1


def backend_of_kept_socket(node: Sandbox) -> str:
    (row,) = sockets(node)
    return str(row["backend"])


@pytest.mark.parametrize("name", FRONTS)
def test_a_thousand_names(node: Sandbox, dns: Pair, name: str) -> None:
    start, ask = FRONTS[name]
    first, rest = range(NAMES // 2), range(NAMES // 2, NAMES)
    manifest = node.manifest(service("udp", f"{DNS}:53", dns, "one"))
    arguments = ("--brake", "off", "--metrics", "127.0.0.1:9464")
    with node.agent(manifest, *arguments) as agent, start(DNS, 5390) as front:
        resolve(front, ask, first)
        before = front.udp_sockets()
        if name == "nginx":  # the others do not connect, or for one question only
            assert backend_of_kept_socket(node) == f"127.0.0.1:{dns.ports['one']}"
        generation = agent.status()["generation"]
        node.manifest(service("udp", f"{DNS}:53", dns, "two"))
        agent.wait_generation(generation)
        if name == "nginx":
            now = f"127.0.0.1:{dns.ports['two']}"
            wait_until(lambda: backend_of_kept_socket(node) == now, "it has been moved", 5)
            assert metric('sockhop_resteers_total{result="moved"}') == 1
        resolve(front, ask, rest)
        if name != "unbound":
            assert front.udp_sockets() == before


# --- TCP: as long as there is somebody ------------------------------------------------------------


class Session:
    """A client on pipes: a line in, lines out."""

    def __init__(self, *command: str) -> None:
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, bufsize=1,
        )  # fmt: skip

    def ask(self, line: str) -> str:
        """Send *line*; return the next line of the answer, "" where the client has ended."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{line}\n")
        self.process.stdin.flush()
        return self.process.stdout.readline().strip()

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(OSError):
                assert pipe is not None
                pipe.close()


@contextlib.contextmanager
def vanished(port: int) -> Iterator[None]:
    """Let nothing reach the server at *port*, or leave it, and nobody be told."""
    rules = f"""
    table inet vanish {{
      chain input {{
        type filter hook input priority 0;
        tcp dport {port} drop
        tcp sport {port} drop
      }}
    }}
    """
    subprocess.run(["nft", "-f", "-"], input=rules, text=True, check=True)
    try:
        yield
    finally:
        subprocess.run(["nft", "delete", "table", "inet", "vanish"], check=True)


PSQL = ("psql", "-XAt", "-h", DATABASE, "-U", "postgres")
WHO = "show cluster_name;"


def test_idle_database_sessions(node: Sandbox) -> None:
    with contextlib.ExitStack() as stack:
        pair = stack.enter_context(servers.postgreses(5500))
        manifest = node.manifest(service("tcp", f"{DATABASE}:5432", pair, "one", "two"))
        agent = stack.enter_context(node.agent(manifest, "--brake", "off"))
        sessions: dict[str, Session] = {}
        while len(sessions) < 2:
            session = stack.enter_context(Session(*PSQL))
            sessions.setdefault(session.ask(WHO), session)
        stack.enter_context(vanished(pair.ports["one"]))
        generation = agent.status()["generation"]
        begin = time.monotonic()
        node.manifest(service("tcp", f"{DATABASE}:5432", pair))
        agent.wait_generation(generation)
        wait_until(
            lambda: {row["backend"] for row in sockets(node)} == at(pair, "two"),
            "the idle session at one has ended",
            30,
        )
        seconds = time.monotonic() - begin
        assert seconds >= DRAIN
        assert sessions["two"].ask(WHO) == "two"
        time.sleep(DRAIN)
        assert sessions["two"].ask(WHO) == "two"
        assert sessions["one"].ask(WHO) == "server closed the connection unexpectedly"
        assert sessions["one"].process.wait(10) == 2  # psql(1): the connection went bad


def at(pair: Pair, *names: str) -> set[str]:
    return {f"127.0.0.1:{pair.ports[name]}" for name in names}


def test_redis_clients(node: Sandbox) -> None:
    """The library connects again; redis-cli does so after a reset only, so it ends."""
    with contextlib.ExitStack() as stack:
        pair = stack.enter_context(servers.redises(6400))
        manifest = node.manifest(service("tcp", f"{CACHE}:6379", pair, "one"))
        agent = stack.enter_context(node.agent(manifest, "--brake", "off"))
        client = stack.enter_context(redis.Redis(CACHE, single_connection_client=True))
        by_hand = stack.enter_context(Session("redis-cli", "-h", CACHE))
        assert client.get("name") == b"one"
        assert by_hand.ask("GET name") == "one"
        stack.enter_context(vanished(pair.ports["one"]))
        generation = agent.status()["generation"]
        node.manifest(service("tcp", f"{CACHE}:6379", pair, "two"))
        agent.wait_generation(generation)
        wait_until(lambda: not sockets(node), "the sockets at one have ended", 30)
        assert client.get("name") == b"two"
        assert by_hand.ask("GET name") == "Error: Software caused connection abort"
        assert by_hand.process.wait(10) == 1
