"""The agent as a process: follows its sources, survives its own death, says what is wrong."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from sockhop.kernel import netns
from sockhop.kernel.cgroups import cgroup_root
from tests.agent.churn import VIP, Loop, churn, random_state
from tests.sandbox import Agent, Sandbox, ServerThread, compact, publish, wait_until

pytestmark = pytest.mark.kernel


def web(*backends: ServerThread, vip: str = VIP) -> str:
    return compact(
        web={"frontends": [f"{vip}:80"], "backends": [server.endpoint for server in backends]}
    )


def ask(address: str = VIP, port: int = 80) -> str:
    with socket.create_connection((address, port), timeout=5) as client:
        return client.recv(100).decode()


def asked(n: int = 40) -> set[str]:
    return {ask() for _ in range(n)}


@pytest.fixture
def servers(sandbox: Sandbox):  # type: ignore[no-untyped-def]
    with ServerThread("one", "10.96.0.1") as one, ServerThread("two", "10.96.0.1") as two:
        yield one, two


def test_a_changed_manifest_is_followed(sandbox: Sandbox, servers: list[ServerThread]) -> None:
    one, two = servers
    path = sandbox.manifest(web(one))
    with pytest.raises(OSError, match="unreachable"):
        ask()
    with sandbox.agent(path):
        assert asked() == {"one"}
        publish(path, web(one, two))
        wait_until(lambda: asked() == {"one", "two"}, "both backends to serve")
        publish(path, web(two))
        wait_until(lambda: asked() == {"two"}, "only the second to serve")
        publish(path, compact())
        wait_until(lambda: not json.loads(sandbox.sockhop("get", "services", "-o", "json").stdout),
                   "no services")  # fmt: skip
        with pytest.raises(OSError, match="unreachable"):
            ask()


def test_no_backend_is_said_at_once(sandbox: Sandbox) -> None:
    path = sandbox.manifest(web())
    with sandbox.agent(path, "--metrics", "127.0.0.1:9464") as agent:
        begin = time.monotonic()
        with pytest.raises(OSError, match="No route to host"):
            ask()
        assert time.monotonic() - begin < 1
        rejected = (
            'sockhop_connects_total{port="",protocol="tcp",result="no_backend",service="web"} 1.0'
        )
        assert rejected in scrape("/metrics")
        line = "web: rejected with EHOSTUNREACH, no backend is active: 1"
        wait_until(lambda: line in agent.log.read_text(), "the rejection in the log")


def scrape(path: str) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:9464{path}", timeout=5) as answer:
        return str(answer.read().decode())


@pytest.mark.parametrize(
    ("broken", "complaint"),
    [
        ("version: 1\nservices: [{name: web, frontends: ['10.0.0.10:80'], backends: [7]}]", "7"),
        ("", "found no document"),
        (None, "no such file"),
    ],
    ids=["broken", "empty", "missing"],
)
def test_a_broken_source_keeps_the_last_good_state(
    sandbox: Sandbox, servers: list[ServerThread], broken: str | None, complaint: str
) -> None:
    path = sandbox.manifest(web(servers[0]))
    with sandbox.agent(path, "--metrics", "127.0.0.1:9464") as agent:
        assert "sockhop_source_error 0.0" in scrape("/metrics")
        generation = agent.status()["generation"]
        if broken is None:
            path.unlink()
        else:
            publish(path, broken)
        error = wait_until(lambda: agent.status()["source"]["error"], "the error in status")
        assert str(path) in error
        assert complaint in error.lower()
        assert "sockhop_source_error 1.0" in scrape("/metrics")
        assert complaint in scrape("/healthz").lower()
        assert sandbox.sockhop("status", check=False).returncode == 1
        assert str(path) in agent.log.read_text()
        assert asked() == {"one"}
        publish(path, web(*servers))
        wait_until(lambda: not agent.status()["source"]["error"], "the error to go")
        assert agent.wait_generation(generation) == generation + 1
        assert asked() == {"one", "two"}
        assert sandbox.sockhop("status").returncode == 0


def test_a_broken_source_at_the_start_changes_nothing(
    sandbox: Sandbox, servers: list[ServerThread]
) -> None:
    bad = sandbox.manifest("version: 1\nservices: [{name: web}", "bad.yaml")
    result = sandbox.sockhop("agent", "-f", str(bad), check=False)
    assert result.returncode == 2
    assert "bad.yaml:" in result.stderr
    assert "Traceback" not in result.stderr
    assert not sandbox.pins.exists()
    with sandbox.agent(sandbox.manifest(web(servers[0]))) as agent:
        assert agent.stop() == 0
        assert sandbox.sockhop("agent", "-f", str(bad), check=False).returncode == 2
        assert asked() == {"one"}


def test_the_datapath_outlives_the_agent(sandbox: Sandbox, servers: list[ServerThread]) -> None:
    path = sandbox.manifest(web(*servers))
    with sandbox.agent(path) as agent:
        before = json.loads(sandbox.sockhop("get", "backends", "-o", "json").stdout)
        assert agent.stop() == 0
        assert "goes on balancing" in agent.log.read_text()
    assert asked() == {"one", "two"}
    assert sandbox.sockhop("status", check=False).returncode == 1
    with sandbox.agent(path) as agent:
        assert json.loads(sandbox.sockhop("get", "backends", "-o", "json").stdout) == before
        assert asked() == {"one", "two"}
        # Nothing differed, so nothing was written.
        assert agent.status()["generation"] == 1


def test_detach_on_exit(sandbox: Sandbox, servers: list[ServerThread]) -> None:
    with sandbox.agent(sandbox.manifest(web(*servers)), "--detach-on-exit") as agent:
        assert ask() in ("one", "two")
        assert agent.stop(signal.SIGINT) == 0
    assert not sandbox.pins.exists()
    with pytest.raises(OSError, match="unreachable"):
        ask()


def test_a_second_agent_is_refused(sandbox: Sandbox, servers: list[ServerThread]) -> None:
    path = sandbox.manifest(web(*servers))
    with sandbox.agent(path) as agent:
        result = sandbox.sockhop("agent", "-f", str(path), check=False)
        assert result.returncode == 3
        assert "another sockhop process is working here" in result.stderr
        # The first one's socket still answers.
        assert agent.status()["pid"] == agent.process.pid


def test_notifications_and_hangup(sandbox: Sandbox, servers: list[ServerThread]) -> None:
    path = sandbox.manifest(web(servers[0]))
    with sandbox.agent(path) as agent:
        # A filesystem without inotify events: only SIGHUP tells.
        agent.process.send_signal(signal.SIGHUP)
        wait_until(lambda: "SIGHUP" in agent.log.read_text(), "the hangup in the log")
        agent.stop()
        agent_said = agent.log.read_text()
    for line in agent_said.splitlines():
        assert {"time", "level", "message"} == json.loads(line).keys()


def test_the_watchdog_is_fed(
    sandbox: Sandbox, servers: list[ServerThread], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", "200000")
    agent = sandbox.start_agent("-f", str(sandbox.manifest(web(servers[0])))).wait_ready()
    agent.notified.settimeout(5)
    messages = [agent.notified.recv(4096).decode() for _ in range(5)]
    assert messages.count("WATCHDOG=1") >= 4
    agent.process.send_signal(signal.SIGTERM)
    while "STOPPING=1" not in agent.notified.recv(4096).decode():
        pass
    assert agent.process.wait(20) == 0


KILLS = int(os.environ.get("SOCKHOP_KILLS", "12"))


@pytest.mark.timeout(3600)
def test_killed_at_random_moments(sandbox: Sandbox, servers: list[ServerThread]) -> None:
    """SIGKILL while manifests change and clients connect: no connect fails."""
    seed = int(os.environ.get("SOCKHOP_SEED", random.SystemRandom().randrange(1 << 32)))
    print(f"SOCKHOP_SEED={seed}, {KILLS} kills")
    chance = random.Random(seed)
    path = sandbox.manifest(random_state(chance, servers))
    sandbox.start_agent("-f", str(path)).wait_ready()
    loop = Loop(VIP)
    try:
        agent = sandbox._agents[-1]
        for _ in range(KILLS):
            churn(chance, path, servers, until=time.monotonic() + chance.uniform(0, 0.7))
            agent.stop(signal.SIGKILL)
            assert "Traceback" not in agent.log.read_text()
            agent = sandbox.start_agent("-f", str(path))
            if chance.random() < 0.7:
                agent.wait_ready()
    finally:
        rate = loop.stop()
    print(f"{loop.answers.total():,} connects, {rate:,.0f} a second, {loop.answers}")
    assert not loop.failures, f"SOCKHOP_SEED={seed}: {loop.failures[:5]}"
    assert loop.answers["one"]
    assert loop.answers["two"]
    settle(sandbox, agent, path, servers)


def used(sandbox: Sandbox) -> dict[str, int]:
    maps = json.loads(sandbox.sockhop("status", "-o", "json").stdout)["maps"]
    return {use["map"]: use["used"] for use in maps if use["map"] != "live"}


def frontends(sandbox: Sandbox) -> list[str]:
    rows = json.loads(sandbox.sockhop("get", "services", "-o", "json").stdout)
    return [row["frontend"] for row in rows]


def settle(sandbox: Sandbox, agent: Agent, path: Path, servers: list[ServerThread]) -> None:
    """After all that, a change is still followed, and nothing but it is in the maps."""
    publish(path, web(servers[0]))
    # The state before it may answer "one" as well: the frontends tell that this one is in.
    wait_until(lambda: frontends(sandbox) == [f"{VIP}:80/tcp"], "the last state")
    assert asked() == {"one"}
    wait_until(lambda: used(sandbox) == {
        "frontends": 1, "slots": 1, "tables": 0, "backends": 1, "services": 1
    }, "nothing else in the maps")  # fmt: skip
    assert agent.stop() == 0


def test_a_service_for_one_namespace(sandbox: Sandbox) -> None:
    """`clients.namespaces` by path: a namespace that appears later is served, others never."""
    there, elsewhere = f"{sandbox.name}-there", f"{sandbox.name}-else"
    path = sandbox.manifest(
        compact(
            web={
                "frontends": [f"{VIP}:80/udp"],
                "backends": ["10.1.0.1:80"],
                "clients": {"namespaces": [f"/run/netns/{there}"]},
            }
        )
    )

    def served(name: str) -> bool:
        with (
            netns.entered(Path("/run/netns") / name),
            socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client,
        ):
            if client.connect_ex((VIP, 80)):
                return False
            # The kernel's own word: 10.1.0.1:80, in the hex of its host order.
            return "0100010A:0050" in Path("/proc/thread-self/net/udp").read_text()

    with sandbox.agent(path, "--settle-every", "1") as agent:
        assert f"/run/netns/{there}" in agent.log.read_text()
        with made_namespace(there), made_namespace(elsewhere):
            wait_until(lambda: served(there), "the new namespace to be served")
            assert not served(elsewhere)
            assert not served(sandbox.name)


def test_a_service_for_some_cgroups(sandbox: Sandbox) -> None:
    """The cgroup in which a socket was made decides, the deepest that is named."""
    inside, inner, other = (sandbox.cgroup / name for name in ("in", "in/not", "other"))
    root = cgroup_root()

    def service(vip: str, **clients: list[Path]) -> dict[str, Any]:
        paths = {
            name: [f"/{c.relative_to(root)}" for c in found] for name, found in clients.items()
        }
        return {"frontends": [f"{vip}:80"], "backends": ["10.1.0.1:80"], "clients": paths}

    listed, excluded, later = "10.0.0.11", "10.0.0.12", "10.0.0.13"
    path = sandbox.manifest(
        compact(
            listed=service(listed, cgroups=[inside], exclude=[inner]),
            excluded=service(excluded, exclude=[inside]),
            later=service(later, cgroups=[other]),
        )
    )

    def served(cgroup: Path, vip: str) -> bool:
        program = f"import socket; print(socket.socket().connect_ex(('{vip}', 80)))"
        join = 'echo $$ > "$0/cgroup.procs" && exec "$@"'
        subprocess.run(
            ["sh", "-c", join, cgroup, sys.executable, "-Ec", program], check=True, timeout=20
        )
        live = json.loads(sandbox.sockhop("get", "services", "-o", "json").stdout)
        connects = {row["frontend"]: row["connects"] for row in live}[f"{vip}:80/tcp"]
        before, seen[vip] = seen[vip], connects
        return bool(connects > before)

    seen = dict.fromkeys((listed, excluded, later), 0)
    inner.mkdir(parents=True)
    with sandbox.agent(path, "--settle-every", "1") as agent:
        try:
            assert served(inside, listed)
            assert not served(inner, listed)
            assert not served(sandbox.cgroup, listed)
            assert served(sandbox.cgroup, excluded)
            assert not served(inside, excluded)
            assert not served(inner, excluded)
            assert f"{other}: there is no such cgroup" in agent.log.read_text()
            other.mkdir()
            wait_until(lambda: served(other, later), "the new cgroup to be served")
            assert not served(sandbox.cgroup, later)
        finally:
            for cgroup in (inner, inside, other):
                cgroup.rmdir()


@contextmanager
def made_namespace(name: str) -> Iterator[None]:
    subprocess.run(["ip", "netns", "add", name], check=True)
    try:
        subprocess.run(["ip", "-n", name, "link", "set", "lo", "up"], check=True)
        # Every address is local there: a connect needs a route.
        subprocess.run(
            ["ip", "-n", name, "route", "add", "local", "10.0.0.0/8", "dev", "lo"], check=True
        )
        yield
    finally:
        subprocess.run(["ip", "netns", "del", name], check=True)
