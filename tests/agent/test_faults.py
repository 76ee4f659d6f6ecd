"""What befalls a running agent from outside: it goes on, and says so."""

import json
import resource
import socket
import time
from pathlib import Path
from typing import Any

import pytest

from sockhop.agent.concerns import live_sockets
from sockhop.model import BackendState, Intent, IntentKind, IntentRule, Protocol, Trigger
from tests.agent.test_agent import asked, servers, web
from tests.agent.test_orders import node, opened, plan_for
from tests.datapath.node import Node, backend, service
from tests.sandbox import Sandbox, ServerThread, publish, wait_until

__all__ = ["node", "servers"]

pytestmark = pytest.mark.kernel


def test_what_no_change_tells_of_is_tried_again(
    sandbox: Sandbox, servers: list[ServerThread]
) -> None:
    """A moment without free descriptors: the manifest is read later, though nobody touches it."""
    path = sandbox.manifest(web(servers[0]))
    with sandbox.agent(path) as agent:
        limits = resource.prlimit(agent.process.pid, resource.RLIMIT_NOFILE)
        resource.prlimit(agent.process.pid, resource.RLIMIT_NOFILE, (3, limits[1]))
        publish(path, web(*servers))
        wait_until(lambda: "Too many open files" in agent.log.read_text(), "the fault")
        assert asked() == {"one"}
        resource.prlimit(agent.process.pid, resource.RLIMIT_NOFILE, limits)
        wait_until(lambda: asked() == {"one", "two"}, "another try", 20)
        assert agent.log.read_text().count("the last good state stays in force") == 1
        assert not agent.status()["source"]["error"]


def test_a_service_without_room_keeps_no_policy_from_being_in_force(
    sandbox: Sandbox, servers: list[ServerThread]
) -> None:
    before = json.loads(web(servers[0]))
    path = sandbox.manifest(json.dumps(before))
    with sandbox.agent(path, "--map-size", "slots=16") as agent:
        assert asked() == {"one"}
        crowd = [f"10.96.0.1:{port}" for port in range(9000, 9040)]
        big = {"name": "big", "frontends": ["10.0.0.11:80"], "backends": crowd}
        denied = {"name": "nobody", "deny": [{"cidr": "10.96.0.0/16"}]}
        both = before | {"services": [*before["services"], big], "policies": [denied]}
        publish(path, json.dumps(both))
        wait_until(lambda: agent.status()["sync_error"], "the refusal")
        with pytest.raises(PermissionError):
            asked()
        assert [each["name"] for each in agent.status()["policies"]] == ["nobody"]
        publish(path, json.dumps(both | {"services": before["services"], "policies": []}))
        wait_until(lambda: not agent.status()["sync_error"], "the recovery")
        assert asked() == {"one"}


def test_clients_that_never_end_do_not_keep_it_from_ending(
    sandbox: Sandbox, servers: list[ServerThread]
) -> None:
    """systemd would kill it after a while, and with --detach-on-exit hooks would stay."""
    arguments = ("--detach-on-exit", "--metrics", "127.0.0.1:9464")
    with (
        sandbox.agent(sandbox.manifest(web(servers[0])), *arguments) as agent,
        socket.socket(socket.AF_UNIX) as one,
        socket.create_connection(("127.0.0.1", 9464)) as two,
    ):
        one.connect(str(sandbox.api))
        for client, request in ((one, "POST /v1/approve"), (two, "GET /metrics")):
            head = f"{request} HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n"
            client.sendall(head.encode())
        agent.status()  # by then it has seen their requests
        begin = time.monotonic()
        assert agent.stop() == 0
        assert time.monotonic() - begin < 8
        assert not sandbox.pins.exists()


def test_status_reads_the_live_index_once_however_many_drain(
    node: Node, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With 65,536 keys in it, once for each backend would keep the agent busy for minutes."""
    rules = (IntentRule(Protocol.TCP, Trigger.MAINTENANCE, Intent(IntentKind.DRAIN, 60.0)),)

    def state(which: BackendState) -> list[object]:
        return [backend(f"10.96.0.1:{port}", state=which) for port in range(8001, 8021)]

    frontends = ("10.0.0.10:80/tcp",)
    node.install(service("web", *frontends, backends=state(BackendState.ACTIVE), intents=rules))
    resting = service("web", *frontends, backends=state(BackendState.MAINTENANCE), intents=rules)
    reads: list[object] = []
    read = live_sockets

    def counted(live: Any) -> Any:
        reads.append(live)
        return read(live)

    with opened(node, tmp_path) as terminator:
        plan = plan_for(node, resting)
        terminator.prepare(plan, {"web": resting})
        node.installer.apply(plan)
        terminator.begin()
        monkeypatch.setattr("sockhop.agent.carry_out.live_sockets", counted)
        terminator.state()
    assert len(reads) == 1
