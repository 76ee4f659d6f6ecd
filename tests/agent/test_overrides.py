"""`sockhop backend`: what a person says of a backend, and when it ends."""

import json
import signal
import socket
import time
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest
from click.testing import CliRunner

from sockhop.agent.client import ask_agent, set_backend
from sockhop.agent.orders import now
from sockhop.agent.overrides import with_overrides
from sockhop.agent.state import AgentState, BackendRequest, Override
from sockhop.cli.backend import command
from sockhop.model import Backend, BackendState, Desired, Frontend, Protocol, Service
from tests.sandbox import Sandbox, ServerThread, compact, publish, wait_until

VIP, OTHER = "10.0.0.10", "10.0.0.11"
MAINTENANCE, QUARANTINED = BackendState.MAINTENANCE, BackendState.QUARANTINED


@pytest.fixture
def servers(sandbox: Sandbox) -> Iterator[list[ServerThread]]:
    with ServerThread("one", "10.96.0.1") as one, ServerThread("two", "10.96.0.1") as two:
        yield [one, two]


def manifest(*servers: ServerThread, **fields: Any) -> str:
    backends = [each.endpoint for each in servers]
    return compact(
        web={"frontends": [f"{VIP}:80"], "backends": backends} | fields,
        other={"frontends": [f"{OTHER}:80"], "backends": backends} | fields,
    )


def asked(sandbox: Sandbox) -> AgentState:
    found = ask_agent(sandbox.api)
    assert found
    return found.state


def by_hand(sandbox: Sandbox) -> list[Override]:
    return asked(sandbox).overrides


def say(sandbox: Sandbox, server: ServerThread, state: BackendState, seconds: float = 0) -> None:
    request = BackendRequest(server.address, server.port, state, seconds=seconds)
    assert set_backend(sandbox.api, request)


def dialled(address: str, n: int = 40) -> set[str]:
    found = set()
    for _ in range(n):
        with socket.create_connection((address, 80), timeout=5) as client:
            found.add(client.recv(100).decode())
    return found


@pytest.mark.unit
def test_an_override_is_for_a_backend_of_a_service() -> None:
    backends = (Backend("10.1.0.1", 80), Backend("10.1.0.2", 80, BackendState.TERMINATING))
    frontends = tuple(
        Frontend("10.0.0.1", port, Protocol.TCP, backends=backends) for port in (80, 443)
    )
    desired = Desired((Service("a", frontends), Service("b", frontends)))
    said = [
        Override("a", "10.1.0.1", 80, MAINTENANCE),
        Override("a", "10.1.0.1", 81, QUARANTINED),
        Override("c", "10.1.0.2", 80, QUARANTINED),
    ]
    found = with_overrides(desired, said)
    for frontend in found.services[0].frontends:
        assert [b.state for b in frontend.backends] == [MAINTENANCE, BackendState.TERMINATING]
    assert found.services[1] is desired.services[1]


@pytest.mark.kernel
def test_a_backend_that_is_taken_out_by_hand(sandbox: Sandbox, servers: list[ServerThread]) -> None:
    one = servers[0]
    path = sandbox.manifest(manifest(*servers))
    with sandbox.agent(path, "--metrics", "127.0.0.1:9464") as agent:
        done = sandbox.sockhop("backend", "maintenance", one.endpoint, "--service", "web")
        assert done.stdout == f"{one.endpoint} of web: maintenance\n"
        # It is in force when the command returns.
        assert dialled(VIP) == {"two"}
        assert dialled(OTHER) == {"one", "two"}
        assert f"{one.endpoint} of web: maintenance" in sandbox.sockhop("status").stdout
        rows = json.loads(sandbox.sockhop("get", "backends", "-o", "json").stdout)
        assert {
            (row["service"], row["backend"], row["state"]) for row in rows if row["by_hand"]
        } == {("web", one.endpoint, "maintenance")}
        for command in (("plan", "-f", str(path)), ("verify",), ("verify", "-f", str(path))):
            assert sandbox.sockhop(*command).returncode == 0
        with urllib.request.urlopen("http://127.0.0.1:9464/metrics", timeout=5) as answer:
            assert "sockhop_backends_by_hand 1.0" in answer.read().decode()
        # In all services; what was said last holds.
        done = sandbox.sockhop("backend", "quarantine", one.endpoint, "-o", "json")
        said = json.loads(done.stdout)
        assert {(each["service"], each["state"]) for each in said} == {
            ("web", "quarantined"),
            ("other", "quarantined"),
        }
        assert dialled(OTHER) == {"two"}
        # A manifest that changes, or breaks, changes nothing about that.
        before = agent.status()["generation"]
        publish(path, manifest(*servers, algorithm="round-robin"))
        agent.wait_generation(before)
        publish(path, "services: [")
        wait_until(lambda: agent.status()["source"]["error"], "the error")
        assert dialled(VIP) == {"two"}
        done = sandbox.sockhop("backend", "activate", one.endpoint)
        assert f"{one.endpoint} of other: what the manifest says again\n" in done.stdout
        assert dialled(VIP) == dialled(OTHER) == {"one", "two"}
        assert by_hand(sandbox) == []
        events = json.loads(sandbox.sockhop("events", "-o", "json").stdout)
        told = [(each["kind"], each["service"], each["reason"]) for each in events]
        assert ("set", "web", f"{one.endpoint} of web is in maintenance, by hand") in told
        assert (
            "set",
            "web",
            f"{one.endpoint} of web is again what the manifest says, by hand",
        ) in told


@pytest.mark.kernel
def test_what_cannot_be_done_is_said(sandbox: Sandbox, servers: list[ServerThread]) -> None:
    one = servers[0]
    with sandbox.agent(sandbox.manifest(manifest(*servers))):
        done = sandbox.sockhop("backend", "activate", one.endpoint, check=False)
        assert (done.returncode, done.stderr) == (
            1, f"{one.endpoint}: nothing was said of it by hand\n",
        )  # fmt: skip
        done = sandbox.sockhop("backend", "quarantine", "10.96.0.9:80", check=False)
        assert (done.returncode, done.stderr) == (
            1, "10.96.0.9:80: no service has that backend\n",
        )  # fmt: skip
        # What cannot be kept is not done.
        sandbox.api.with_suffix(".overrides").mkdir()
        done = sandbox.sockhop("backend", "quarantine", one.endpoint, check=False)
        assert done.returncode == 3
        assert "nothing was changed" in done.stderr
        assert by_hand(sandbox) == []
        assert dialled(VIP) == {"one", "two"}
    assert sandbox.sockhop("backend", "activate", one.endpoint, check=False).returncode == 3


@pytest.mark.unit
def test_what_is_no_backend_is_said() -> None:
    bad = (
        "10.1.0.1",
        "localhost:80",
        "10.1.0.1:0",
        "10.1.0.1:65536",
        "[::1:80",
        "::1:80",
        "[1.2.3.4]:80",
    )
    for text in bad:
        done = CliRunner().invoke(command, ["quarantine", text])
        assert done.exit_code == 2
        assert "expected ADDRESS:PORT" in done.output
    for arguments in (
        ["activate", "10.1.0.1:80", "--for", "1h"],
        ["quarantine", "[::1]:80", "--for", "soon"],
    ):
        assert CliRunner().invoke(command, arguments).exit_code == 2


@pytest.mark.kernel
@pytest.mark.parametrize("kept", [True, False])
def test_it_outlives_the_agent(sandbox: Sandbox, servers: list[ServerThread], kept: bool) -> None:
    """At no moment does the next agent let it serve. Without the file, the mutant, it does."""
    path = sandbox.manifest(manifest(*servers))
    with sandbox.agent(path) as agent:
        say(sandbox, servers[0], MAINTENANCE, 3600)
        agent.stop(signal.SIGKILL)
    assert dialled(VIP) == {"two"}
    if kept:
        assert sandbox.sockhop("plan", "-f", str(path)).returncode == 0
    else:
        sandbox.api.with_suffix(".overrides").write_text('{"epoch": 7}')
    with sandbox.agent(path) as agent:
        assert dialled(VIP) == ({"two"} if kept else {"one", "two"})
        assert asked(sandbox).generation == (2 if kept else 3)
        lost = "what was said by hand is lost" in agent.log.read_text()
        assert lost is not kept
        if kept:
            assert " for 59m" in sandbox.sockhop("status").stdout
            assert 0 < (asked(sandbox).overrides[0].until or 0) - now() < 3600


@pytest.mark.kernel
def test_it_ends_with_its_time_and_with_its_backend(
    sandbox: Sandbox, servers: list[ServerThread]
) -> None:
    """And meanwhile it is not checked."""
    one, two = servers
    check = {"health": {"tcp": {}, "interval": "100ms", "timeout": "5s", "rise": 1, "fall": 1}}
    path = sandbox.manifest(manifest(*servers, **check))
    with sandbox.agent(path) as agent:
        wait_until(lambda: asked(sandbox).health.checked == 2, "the checks")
        begin = time.monotonic()
        say(sandbox, one, QUARANTINED, 0.5)
        assert dialled(VIP) == {"two"}
        assert asked(sandbox).health.checked == 1
        wait_until(lambda: not by_hand(sandbox), "its end")
        assert time.monotonic() - begin >= 0.5
        assert asked(sandbox).health.checked == 2
        assert dialled(VIP) == {"one", "two"}
        # One that leaves and comes back is as its manifest says.
        say(sandbox, one, MAINTENANCE)
        publish(path, manifest(two, **check))
        wait_until(lambda: not by_hand(sandbox), "its end")
        publish(path, manifest(*servers, **check))
        wait_until(lambda: dialled(VIP) == {"one", "two"}, "its return")
        log = agent.log.read_text()
        assert f"{one.endpoint} of web is again what the manifest says: its time is over" in log
        assert f"{one.endpoint} of web is in the manifest no more" in log
