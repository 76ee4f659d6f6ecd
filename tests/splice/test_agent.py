"""Opting in and out with a running agent: by service, namespace, cgroup and address."""

import contextlib
import json
import socket
import time
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest

from sockhop.datapath.balancer import BalanceMaps
from sockhop.datapath.splicer import SpliceMaps, Sweeper
from tests.sandbox import Sandbox, compact, publish, wait_until
from tests.splice.stage import cookie
from tests.splice.tcpinfo import tcp_info

pytestmark = pytest.mark.kernel

FRONTEND = ("10.96.0.1", 80)


@contextlib.contextmanager
def dialled(target: tuple[str, int], server: socket.socket) -> Iterator[tuple[socket.socket, ...]]:
    client = socket.create_connection(target, 5)
    there = server.accept()[0]
    with client, there:
        yield client, there


def is_spliced(client: socket.socket, there: socket.socket) -> bool:
    """Let both ends talk; tell whether the stack saw none of it."""
    for one, other in ((client, there), (there, client)):
        one.sendall(b"words")
        assert other.recv(10) == b"words"
    return tcp_info(client).bytes_sent == tcp_info(there).bytes_sent == 0


@pytest.fixture
def server() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as made:
        yield made


def web(server: socket.socket, **fields: Any) -> str:
    backend = f"127.0.0.1:{server.getsockname()[1]}"
    return compact(web={"frontends": ["10.96.0.1:80"], "backends": [backend], **fields})


@pytest.fixture
def inside(sandbox: Sandbox) -> Iterator[tuple[Sandbox, socket.socket]]:
    with socket.create_server(("127.0.0.1", 0)) as made:
        yield sandbox, made


Inside = tuple[Sandbox, socket.socket]


def splices(sandbox: Sandbox) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads(sandbox.sockhop("get", "splices", "-o", "json").stdout)
    return rows


@pytest.mark.parametrize("choice", ["on", "auto"])
def test_a_service_that_is_named(inside: Inside, choice: str) -> None:
    sandbox, server = inside
    manifest = sandbox.manifest(web(server, splice=choice))
    with sandbox.agent(manifest) as agent:
        assert agent.status()["splicing"]["state"] == "on"
        assert agent.status()["splicing"]["services"] == ["web"]
        shares = []
        for _ in range(20):
            with dialled(FRONTEND, server) as ends:
                shares.append(is_spliced(*ends))
        # `auto` leaves some on the stack, to compare with.
        assert all(shares) if choice == "on" else sum(shares) > 10
        # Who dials the backend itself has not dialled the service.
        with dialled(server.getsockname(), server) as ends:
            assert not is_spliced(*ends)
        with dialled(FRONTEND, server) as (client, there):
            is_spliced(client, there)
            rows = {row["cookie"]: row for row in splices(sandbox)}
            assert set(rows) == {cookie(client), cookie(there)}
            assert rows[cookie(client)]["service"] == "web"
            assert rows[cookie(client)]["peer"] in (cookie(there), 0)
        text = sandbox.sockhop("status").stdout
        assert "splicing" in text
        assert "on: web" in text


def test_a_service_has_limits_of_its_own(inside: Inside) -> None:
    sandbox, server = inside
    limits = {"mode": "on", "budget": "4KiB", "leaveAfter": "8KiB"}
    manifest = sandbox.manifest(web(server, splice=limits))
    with sandbox.agent(manifest), dialled(FRONTEND, server) as (client, there):
        for size in (4096, 1):  # the second is one byte too much
            client.sendall(b"x" * size)
            assert len(there.recv(5000)) == size
        (row,) = (row for row in splices(sandbox) if row["cookie"] == cookie(client))
        assert (row["budget"], row["leave_after"]) == (4096, 8192)
        assert (row["spliced"], row["stack"], row["why"]) == (4096, 1, "budget")
        client.sendall(b"x" * 8192)
        left = 8192
        while left:
            left -= len(there.recv(left))
        # The other direction would still be spliced; it leaves with this one.
        with Sweeper(sandbox.pins) as sweeper:
            wait_until(lambda: not sweeper.sockets(), "both out of the sockhash")
        publish(manifest, web(server, splice=limits | {"budget": "5KiB"}))

        def budgets() -> set[int]:
            with dialled(FRONTEND, server), Sweeper(sandbox.pins) as sweeper:
                return {each.lane.budget for each in sweeper.sockets()}

        wait_until(lambda: budgets() == {5120}, "a changed budget")


def test_off_by_default_and_by_word(inside: Inside) -> None:
    sandbox, server = inside
    manifest = sandbox.manifest(web(server))
    with sandbox.agent(manifest, "--splice-netns", str(sandbox.netns)):
        with dialled(FRONTEND, server) as ends:
            assert is_spliced(*ends)
        publish(manifest, web(server, splice="off"))
        wait_until(lambda: not _next_is_spliced(server), "a veto")
        with dialled(server.getsockname(), server) as ends:
            assert is_spliced(*ends)
    with sandbox.agent(manifest) as agent:
        assert agent.status()["splicing"]["state"] == "off"
        with dialled(FRONTEND, server) as ends:
            assert not is_spliced(*ends)


def _next_is_spliced(server: socket.socket) -> bool:
    with dialled(FRONTEND, server) as ends:
        return is_spliced(*ends)


def test_by_cgroup_and_by_address(inside: Inside) -> None:
    sandbox, server = inside
    manifest = sandbox.manifest(web(server))
    with (
        sandbox.agent(manifest, "--splice-cgroup", f"/{sandbox.name}"),
        dialled(server.getsockname(), server) as ends,
    ):
        assert is_spliced(*ends)
    where = f"127.0.0.1:{server.getsockname()[1]}"
    with sandbox.agent(manifest, "--splice-address", where):
        with dialled(server.getsockname(), server) as ends:
            assert is_spliced(*ends)
        with (
            socket.create_server(("127.0.0.1", 0)) as other,
            dialled(other.getsockname(), other) as ends,
        ):
            assert not is_spliced(*ends)


def test_a_bad_address_is_refused(sandbox: Sandbox) -> None:
    manifest = sandbox.manifest(compact())
    result = sandbox.sockhop("agent", "-f", str(manifest), "--splice-address", "pod-7", check=False)
    assert result.returncode == 2
    assert "pod-7: expected an address" in result.stderr


def test_live_connections_outlast_every_way_out(inside: Inside) -> None:
    sandbox, server = inside
    manifest = sandbox.manifest(web(server, splice="on"))
    with contextlib.ExitStack() as stack:
        with sandbox.agent(manifest) as agent:
            ends = stack.enter_context(dialled(FRONTEND, server))
            other = stack.enter_context(dialled(FRONTEND, server))
            assert is_spliced(*ends)
            assert is_spliced(*other)
            agent.stop(9)
        assert is_spliced(*ends)
        with sandbox.agent(manifest):
            assert is_spliced(*ends)
            with dialled(FRONTEND, server) as fresh:
                assert is_spliced(*fresh)
            publish(manifest, web(server))
            ends[0].sendall(b"unread")
            wait_until(lambda: not _next_is_spliced(server), "off")
            ends[0].sendall(b", by the stack")
            assert ends[1].recv(6) == b"unread"
            assert ends[1].recv(30) == b", by the stack"
            with Sweeper(sandbox.pins) as sweeper:
                wait_until(lambda: not sweeper.sockets(), "all out of the sockhash")
            assert not is_spliced(*ends)
            publish(manifest, web(server, splice="on"))
            wait_until(lambda: _next_is_spliced(server), "on again")
        late = stack.enter_context(dialled(FRONTEND, server))
        assert is_spliced(*late)
        late[0].sendall(b"unread")
        said = sandbox.sockhop("detach").stdout
        assert "1 socket with unread spliced bytes" in said
        assert late[1].recv(10) == b"unread"
        for pair in (ends, other, late):
            assert not is_spliced(*pair)


def metrics() -> str:
    with urllib.request.urlopen("http://127.0.0.1:9464/metrics", timeout=5) as answer:
        return str(answer.read().decode())


def test_metrics_and_bypass(inside: Inside) -> None:
    sandbox, server = inside
    manifest = sandbox.manifest(web(server, splice="on"))
    with sandbox.agent(manifest, "--metrics", "127.0.0.1:9464"):
        with dialled(FRONTEND, server) as (client, there):
            assert is_spliced(client, there)
            sandbox.sockhop("bypass", "on")
            assert not is_spliced(client, there)
            sandbox.sockhop("bypass", "off")
        lines = {
            'sockhop_splice_pairs_total{port="",service="web"} 1.0',
            'sockhop_splice_bytes_total{path="spliced",port="",service="web"} 10.0',
            'sockhop_splice_bytes_total{path="stack",port="",service="web"} 10.0',
            'sockhop_splice_refusals_total{port="",reason="switched-off",service="web"} 2.0',
        }
        wait_until(lambda: not lines - set(metrics().splitlines()), "the metrics")
        with dialled(FRONTEND, server) as ends:
            assert is_spliced(*ends)


def test_the_agent_runs_on_where_splicing_cannot(
    inside: Inside, monkeypatch: pytest.MonkeyPatch
) -> None:
    sandbox, server = inside
    manifest = sandbox.manifest(web(server, splice="on"))
    # Somebody's program holds the hook and lets no other in.
    from sockhop.kernel._libbpf import lib
    from sockhop.kernel.cgroups import AttachType, open_cgroup
    from sockhop.kernel.objects import BpfObject, object_path

    with (
        BpfObject(object_path("vanilla")) as programs,
        open_cgroup(sandbox.cgroup) as cgroup,
    ):
        program = programs.program("vanilla_sock_ops")
        assert lib.bpf_prog_attach(program, cgroup, AttachType.SOCK_OPS, 0) == 0
        with sandbox.agent(manifest) as agent:
            state = agent.status()["splicing"]
            assert (state["state"], "sock_ops" in state["reason"]) == ("unavailable", True)
            with BalanceMaps(sandbox.pins) as maps:
                assert maps.frontends.used()
        lib.bpf_prog_detach2(program, cgroup, AttachType.SOCK_OPS)


def test_auto_gives_up_where_it_does_not_help(inside: Inside) -> None:
    sandbox, server = inside
    manifest = sandbox.manifest(web(server, splice="auto"))
    with sandbox.agent(manifest) as agent, SpliceMaps(sandbox.pins) as maps:
        number = next(number for number, policy in maps.services.items() if policy.service)
        for _ in range(200):
            with dialled(FRONTEND, server) as (client, there):
                for _ in range(10):
                    is_spliced(client, there)
        measured = maps.counters.get(number)
        # Both kinds are timed: one connection of 16 is left on the stack, drawn by lot.
        assert measured.answers > 3 * measured.control_answers > 0
        assert 0 < measured.answer_time / measured.answers < 1e9
        assert 0 < measured.control_time / measured.control_answers < 1e9
        enough = measured._replace(
            answers=2000, answer_time=2000_000, control_answers=2000, control_time=4000_000
        )
        maps.counters.set(number, enough)
        time.sleep(1.5)
        assert agent.status()["splicing"]["given_up"] == []
        maps.counters.set(number, enough._replace(control_time=2100_000))
        wait_until(lambda: agent.status()["splicing"]["given_up"] == ["web"], "giving up")
        wait_until(lambda: not _next_is_spliced(server), "the veto")
        assert "did not help" in sandbox.sockhop("status").stdout
        # It stays so, until the manifest says otherwise.
        publish(manifest, web(server, splice="on"))
        wait_until(lambda: _next_is_spliced(server), "on")


def test_a_namespace_that_is_not_there(inside: Inside) -> None:
    sandbox, server = inside
    manifest = sandbox.manifest(web(server, splice="on"))
    with sandbox.agent(manifest, "--splice-netns", "/run/netns/no-such") as agent:
        state = agent.status()["splicing"]
        assert (state["state"], state["reason"]) == (
            "unavailable",
            "/run/netns/no-such: No such file or directory",
        )
        with dialled(FRONTEND, server) as ends:
            assert not is_spliced(*ends)
