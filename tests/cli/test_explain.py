"""`sockhop explain` tells how a socket came to its backend, and why another has none."""

import json
import os
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from sockhop.kernel.cgroups import cgroup_root
from tests.sandbox import SOCKHOP, Agent, Sandbox, ServerThread, compact, publish, wait_until

pytestmark = pytest.mark.kernel

SO_COOKIE = 57
WEB, WEB6, DNS, OWN, NEAR = "10.96.0.10", "fd00:96::10", "10.96.0.11", "10.96.0.1", "127.77.0.1"
TCP_BACKEND, UDP_BACKEND, BACKEND6 = "127.0.0.1:7001", "127.0.0.1:7002", "[::1]:7003"
HERE = f"127.{128 + (os.getpid() >> 16)}.{os.getpid() >> 8 & 255}.{os.getpid() & 255}"
"""Where clients are that are named by their own end: nobody has it in another namespace."""
SERVICES: dict[str, Any] = {
    "web": {"frontends": [f"{WEB}:80"], "backends": [TCP_BACKEND]},
    "six": {"frontends": [f"[{WEB6}]:80"], "backends": [BACKEND6], "algorithm": "round-robin"},
    "dns": {"frontends": [f"{DNS}:53/udp"], "backends": [UDP_BACKEND],
            "algorithm": "least-connections"},
    "again": {"frontends": [f"{WEB}:81"], "backends": [TCP_BACKEND], "algorithm": "maglev",
              "sessionAffinity": {"clientIP": {"timeout": "3h"}}},
    # The address is the namespace's own: what is not translated meets a server there.
    "own": {"frontends": [f"{OWN}:90", f"{OWN}:91"], "backends": [TCP_BACKEND]},
    "near": {"frontends": [f"{NEAR}:80"], "backends": [TCP_BACKEND]},
    "many": {"frontends": [f"10.97.0.{i}:53/udp" for i in range(6)], "backends": [UDP_BACKEND]},
}  # fmt: skip


class Node(NamedTuple):
    sandbox: Sandbox
    agent: Agent
    old: socket.socket


@pytest.fixture(scope="module")
def node() -> Iterator[Node]:
    with ExitStack() as stack:
        made = stack.enter_context(Sandbox(loopback=(f"{OWN}/32",)))
        for address in (("127.0.0.1", 7001), (OWN, 90), (OWN, 91)):
            # They accept nothing: connections stay established in the queue.
            stack.enter_context(socket.create_server(address, backlog=64))
        six = socket.create_server(("::1", 7003), family=socket.AF_INET6, backlog=64)
        stack.enter_context(six)
        stack.enter_context(ServerThread("dns", "127.0.0.1", 7002, udp=True))
        old = stack.enter_context(socket.create_connection((OWN, 90)))
        agent = stack.enter_context(made.agent(made.manifest(compact(**SERVICES))))
        yield Node(made, agent, old)


def explain(node: Node, what: object) -> tuple[int, dict[str, Any]]:
    result = node.sandbox.sockhop("explain", str(what), "-o", "json", check=False)
    assert not result.stderr
    return result.returncode, json.loads(result.stdout)


def complaint(node: Node, what: object) -> tuple[int, str]:
    result = node.sandbox.sockhop("explain", str(what), check=False)
    assert not result.stdout
    return result.returncode, result.stderr


def descriptor(client: socket.socket) -> str:
    return f"{os.getpid()}:{client.fileno()}"


def cookie_of(client: socket.socket) -> int:
    return int(struct.unpack("=Q", client.getsockopt(socket.SOL_SOCKET, SO_COOKIE, 8))[0])


def text_of(name: Any) -> str:
    host = name[0].removeprefix("::ffff:")
    return f"[{host}]:{name[1]}" if ":" in host else f"{host}:{name[1]}"


def udp() -> socket.socket:
    made = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    made.settimeout(5)
    return made


@contextmanager
def bypassed(node: Node) -> Iterator[None]:
    node.sandbox.sockhop("bypass", "on")
    try:
        yield
    finally:
        node.sandbox.sockhop("bypass", "off")


# --- balanced -------------------------------------------------------------------------------------


def test_every_way_to_name_a_socket(node: Node) -> None:
    begin = time.time()
    with socket.create_connection((WEB, 80), source_address=(HERE, 0)) as client:
        local, cookie = text_of(client.getsockname()), cookie_of(client)
        status, told = explain(node, descriptor(client))
        since = datetime.fromisoformat(told["origin"].pop("since")).timestamp()
        assert begin - 0.1 <= since <= time.time()
        assert 0 <= told["origin"].pop("age") <= time.time() - begin + 0.1
        comm = Path("/proc/self/comm").read_text().strip()
        assert (status, told) == (0, {
            "protocol": "TCP", "state": "ESTAB", "local": local, "remote": TCP_BACKEND,
            "peer_name": f"{WEB}:80", "balanced": True, "datagrams": [], "reasons": [],
            "denied": None, "events": [],
            "processes": [f"{comm}/{os.getpid()} fd {client.fileno()}"], "cookie": cookie,
            "inode": os.fstat(client.fileno()).st_ino,
            "netns": Path("/proc/thread-self/ns/net").stat().st_ino,
            "cgroup": str(node.sandbox.cgroup),
            "origin": {
                "service": "web", "port_name": "", "frontend": f"{WEB}:80/tcp",
                "backend": TCP_BACKEND, "backend_id": told["origin"]["backend_id"],
                "backend_state": "active", "rule": "random",
                "generation": 1, "generation_now": 1,
            },
        })  # fmt: skip
        for name in (
            cookie, f"0x{cookie:x}", f"sk:{cookie:x}", local, f"{local}/tcp",
            f"{local}>{TCP_BACKEND}", f"{local}->{TCP_BACKEND}", f"{local}-{TCP_BACKEND}/tcp",
            f"{local}>{WEB}:80", f"{local}-{WEB}:80", f"{WEB}:80", f"{WEB}:80/tcp",
        ):  # fmt: skip
            status, again = explain(node, name)
            again["origin"].pop("since")
            again["origin"].pop("age")
            assert (status, again) == (0, told), name


def test_table_and_yaml(node: Node) -> None:
    with socket.create_connection((WEB, 80)) as client:
        lines = dict(
            line.split(maxsplit=1) if not line.startswith("chosen by") else ("by", line[9:].strip())
            for line in node.sandbox.sockhop("explain", descriptor(client)).stdout.splitlines()
        )
        local = text_of(client.getsockname())
        assert lines["socket"] == f"{local} > {TCP_BACKEND} TCP ESTAB"
        assert lines["balanced"] == "yes"
        assert lines["dialled"] == f"{WEB}:80/tcp"
        assert lines["backend"] == f"{TCP_BACKEND}, active"
        assert (lines["by"], lines["generation"]) == ("random", "1 (now 1)")
        assert lines["getpeername"] == f"{WEB}:80"
        shown = node.sandbox.sockhop("explain", descriptor(client), "-o", "yaml").stdout
        assert yaml.safe_load(shown)["origin"]["service"] == "web"


def test_families_protocols_and_rules(node: Node) -> None:
    def told_of(family: int, kind: int, address: tuple[str, int]) -> tuple[Any, ...]:
        with socket.socket(family, kind) as client:
            client.connect(address)
            status, told = explain(node, descriptor(client))
            assert (status, told["local"]) == (0, text_of(client.getsockname()))
            # What getpeername() gives is asked through the hooks.
            assert told["peer_name"] == text_of(client.getpeername())
            origin = told["origin"]
            return told["protocol"], origin["frontend"], origin["backend"], origin["rule"]

    assert told_of(socket.AF_INET6, socket.SOCK_STREAM, (WEB6, 80)) == (
        "TCP", f"[{WEB6}]:80/tcp", BACKEND6, "round-robin")  # fmt: skip
    assert told_of(socket.AF_INET6, socket.SOCK_STREAM, (f"::ffff:{WEB}", 80)) == (
        "TCP", f"{WEB}:80/tcp", TCP_BACKEND, "random")  # fmt: skip
    assert told_of(socket.AF_INET, socket.SOCK_DGRAM, (DNS, 53)) == (
        "UDP", f"{DNS}:53/udp", UDP_BACKEND, "least-connections")  # fmt: skip
    rules = [told_of(socket.AF_INET, socket.SOCK_STREAM, (WEB, 81))[3] for _ in range(2)]
    assert rules == ["maglev", "session affinity"]


CHILD = """
import socket, sys
host, port, *own = sys.argv[1:]
client = socket.create_connection((host, int(port)), source_address=(own[0], 0) if own else None)
print(client.fileno(), "%s:%d" % client.getsockname(), flush=True)
sys.stdin.read()
"""


@contextmanager
def child(command: list[str], *arguments: object) -> Iterator[tuple[int, str, str]]:
    """A client in a process that *command* starts: its pid, the descriptor, its local name."""
    with subprocess.Popen(
        [*command, sys.executable, "-Ec", CHILD, *map(str, arguments)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stdout
        assert process.stdin
        fd, local = process.stdout.readline().split()
        yield process.pid, fd, local
        process.stdin.close()


def test_a_socket_of_another_process(node: Node) -> None:
    with child([], WEB, 80, HERE) as (pid, fd, local):
        comm = Path(f"/proc/{pid}/comm").read_text().strip()
        for name in (f"{pid}:{fd}", local):
            status, told = explain(node, name)
            assert (status, told["local"]) == (0, local)
            assert told["processes"] == [f"{comm}/{pid} fd {fd}"]
            assert told["peer_name"] == f"{WEB}:80"


def test_sockets_that_nobody_has_open(node: Node) -> None:
    unsent, done = socket.create_connection((OWN, 91)), socket.create_connection((OWN, 91))
    cookies = cookie_of(unsent), cookie_of(done)
    unsent.setblocking(False)
    with suppress(BlockingIOError):
        while True:
            unsent.send(bytes(1 << 20))
    unsent.close()
    done.close()
    status, told = explain(node, cookies[0])
    assert (status, told["state"], told["processes"]) == (0, "FIN-WAIT-1", [])
    assert (told["origin"]["service"], told["peer_name"]) == ("own", f"{OWN}:91")
    # The kernel keeps less of one that only waits for its peer to end.
    status, told = explain(node, cookies[1])
    assert (status, told["state"]) == (1, "FIN-WAIT-2")
    assert told["reasons"] == ["it is closed, and what was remembered of it is gone"]


def test_a_backend_that_changes(sandbox: Sandbox) -> None:
    def state(*backends: object) -> str:
        return compact(web={"frontends": [f"{WEB}:80"], "backends": list(backends)})

    two = "127.0.0.1:7004"
    path = sandbox.manifest(state(TCP_BACKEND))
    with (
        socket.create_server(("127.0.0.1", 7001)),
        sandbox.agent(path) as agent,
        socket.create_connection((WEB, 80)) as client,
    ):
        node, seen = Node(sandbox, agent, client), []
        leaving = {"address": TCP_BACKEND, "state": "terminating"}
        steps: list[list[object]] = [[leaving, two], [two]]
        for generation, backends in enumerate(steps, 1):
            publish(path, state(*backends))
            agent.wait_generation(generation)
            status, told = explain(node, descriptor(client))
            origin = told["origin"]
            seen.append((status, origin["backend_state"], origin["generation_now"]))
            assert (origin["generation"], origin["service"]) == (1, "web")
        assert seen == [(0, "terminating", 2), (0, "gone", 2)]  # of the frontend
        publish(path, compact())
        agent.wait_generation(3)
        status, told = explain(node, descriptor(client))
        assert (status, told["origin"]["service"], told["origin"]["generation_now"]) == (0, "", 0)
        shown = sandbox.sockhop("explain", descriptor(client)).stdout
        assert "one that is gone" in shown
        assert "1 (the frontend is gone)" in shown


# --- unconnected UDP ------------------------------------------------------------------------------


def test_datagrams(node: Node) -> None:
    with udp() as client:
        client.bind((HERE, 0))
        client.sendto(b"?", (DNS, 53))
        assert client.recvfrom(100)[1] == (DNS, 53)
        client.sendto(b"?", ("10.97.0.1", 53))
        client.recvfrom(100)
        status, told = explain(node, descriptor(client))
        assert (status, told["state"], told["remote"], told["peer_name"]) == (0, "UNCONN", "", "")
        fields = ("service", "frontend", "backend", "backend_state", "latest")
        assert [tuple(row[field] for field in fields) for row in told["datagrams"]] == [
            ("many", "10.97.0.1:53/udp", UDP_BACKEND, "active", True),
            ("dns", f"{DNS}:53/udp", UDP_BACKEND, "active", False),
        ]
        local = text_of(client.getsockname())
        for name in (cookie_of(client), local, f"{local}/udp"):
            assert explain(node, name) == (0, told)
        shown = node.sandbox.sockhop("explain", descriptor(client)).stdout
        assert f"10.97.0.1:53/udp of many -> {UDP_BACKEND}, active; sent there last" in shown
        client.sendto(b"?", (DNS, 53))
        latest = {row["service"]: row["latest"] for row in explain(node, local)[1]["datagrams"]}
        assert latest == {"dns": True, "many": False}


def test_datagrams_to_more_frontends_than_a_socket_has_room_for(node: Node) -> None:
    with udp() as client:
        for i in range(6):
            client.sendto(b"?", (f"10.97.0.{i}", 53))
        status, told = explain(node, descriptor(client))
        assert status == 0
        assert {row["frontend"] for row in told["datagrams"]} == {
            f"10.97.0.{i}:53/udp" for i in range(6)
        }
        assert {row["backend"] for row in told["datagrams"]} == {UDP_BACKEND}
        for i in (5, 0, 4):
            client.sendto(b"?", (f"10.97.0.{i}", 53))
            rows = explain(node, descriptor(client))[1]["datagrams"]
            assert [row["frontend"] for row in rows if row["latest"]] == [f"10.97.0.{i}:53/udp"]


# --- not balanced ---------------------------------------------------------------------------------


def reasons(node: Node, what: object) -> list[str]:
    status, told = explain(node, what)
    assert (status, told["balanced"]) == (1, False)
    assert told["reasons"]
    found: list[str] = told["reasons"]
    return found


OLDER = "it may be older than balancing here, as its process is"


def test_older_than_the_agent(node: Node) -> None:
    status, told = explain(node, descriptor(node.old))
    assert (status, told["origin"], told["peer_name"]) == (1, None, f"{OWN}:90")
    assert told["reasons"] == [
        f"its peer is {OWN}:90 itself, a frontend of own: the connect was not translated", OLDER,
    ]  # fmt: skip
    result = node.sandbox.sockhop("explain", descriptor(node.old), check=False)
    assert result.returncode == 1
    assert f"no: its peer is {OWN}:90 itself" in result.stdout
    assert f"and {OLDER}" in result.stdout


def test_bypass(node: Node) -> None:
    with bypassed(node), child([], OWN, 90) as (pid, fd, _):
        assert reasons(node, f"{pid}:{fd}") == [
            f"its peer is {OWN}:90 itself, a frontend of own: the connect was not translated",
            "bypass is on: every connect passes untouched",
        ]
    with socket.create_connection((WEB, 80)) as client, bypassed(node):
        # It is with its backend all the same, and getpeername() now says so.
        status, told = explain(node, descriptor(client))
        assert (status, told["peer_name"]) == (0, TCP_BACKEND)


def test_another_cgroup(node: Node) -> None:
    other = cgroup_root() / f"{node.sandbox.name}-other"
    other.mkdir()
    try:
        join = ["sh", "-c", 'echo $$ > "$0/cgroup.procs" && exec "$@"', str(other)]
        with child(join, OWN, 90) as (pid, fd, _):
            assert reasons(node, f"{pid}:{fd}")[1:] == [
                f"it was made in the cgroup {other}, "
                f"and balanced is what is made in {node.sandbox.cgroup}"
            ]
    finally:
        wait_until(lambda: not (other / "cgroup.procs").read_text(), "an empty cgroup")
        other.rmdir()


def test_another_namespace(node: Node) -> None:
    script = 'ip link set lo up && exec "$@"'
    serve = f"""
import socket
server = socket.create_server(("{NEAR}", 80))
{CHILD}
"""
    with subprocess.Popen(
        ["unshare", "--net", "sh", "-c", script, "sh", sys.executable, "-Ec", serve, NEAR, "80"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stdout
        assert process.stdin
        fd, local = process.stdout.readline().split()
        # With the peer: some other namespace may have the same local address and port.
        for name in (f"{process.pid}:{fd}", f"{local}>{NEAR}:80"):
            status, told = explain(node, name)
            assert (status, told["local"]) == (1, local)
            assert told["netns"] == Path(f"/proc/{process.pid}/ns/net").stat().st_ino
            assert told["reasons"] == [
                f"its peer {NEAR}:80 is a frontend in other network namespaces only"
            ]
        process.stdin.close()


def test_not_dialled_through_a_frontend(node: Node) -> None:
    with child([], "127.0.0.1", 7001) as (pid, fd, _):
        assert reasons(node, f"{pid}:{fd}") == [
            f"its peer {TCP_BACKEND} is no frontend but a backend of again, near, own, web"
        ]
    with socket.create_server(("127.0.0.1", 7009)), child([], "127.0.0.1", 7009) as (pid, fd, _):
        assert reasons(node, f"{pid}:{fd}") == ["its peer 127.0.0.1:7009 is no frontend"]


def test_a_socket_that_has_left_its_backend(node: Node) -> None:
    with udp() as client:
        client.connect((DNS, 53))
        with bypassed(node):
            client.connect(("127.0.0.1", 9))
        status, told = explain(node, descriptor(client))
        assert (status, told["origin"]["backend"], told["remote"]) == (
            1, UDP_BACKEND, "127.0.0.1:9")  # fmt: skip
        assert told["reasons"] == [
            f"it has left the backend that it was given for {DNS}:53",
            "its peer 127.0.0.1:9 is no frontend",
        ]


def test_sockets_without_a_peer(node: Node) -> None:
    with udp() as unused:
        unused.bind(("127.0.0.1", 0))
        assert reasons(node, descriptor(unused))[0] == (
            "it is not connected, and has sent to no frontend since it was made"
        )
    with socket.create_server(("127.0.0.1", 0)) as server:
        assert reasons(node, descriptor(server)) == [
            "it listens; balanced are sockets that connect or send"
        ]


def test_whom_a_service_does_not_serve(sandbox: Sandbox) -> None:
    own = {"frontends": [f"{OWN}:90"], "backends": [TCP_BACKEND]}
    group = f"/{sandbox.cgroup.relative_to(cgroup_root())}"
    path = sandbox.manifest(compact(own=own | {"clients": {"exclude": [group]}}))
    with (
        socket.create_server((OWN, 90)) as server,
        sandbox.agent(path) as agent,
        child([], OWN, 90) as (pid, fd, _),
    ):
        node = Node(sandbox, agent, server)
        assert reasons(node, f"{pid}:{fd}")[1:] == [
            f"the service excludes the cgroup {sandbox.cgroup}, and it was made in {sandbox.cgroup}"
        ]
        publish(path, compact(own=own | {"clients": {"cgroups": ["/nobody"]}}))
        agent.wait_generation(1)
        assert reasons(node, f"{pid}:{fd}")[1:] == [
            f"the service is for some cgroups only; it was made in {sandbox.cgroup}"
        ]


def test_without_the_right_to_look_into_processes(node: Node) -> None:
    command = [str(SOCKHOP), "explain", "-o", "json"]
    weak = ["setpriv", "--bounding-set=-sys_ptrace", "--inh-caps=-sys_ptrace", *command]
    with socket.create_connection((WEB, 80)) as client, udp() as sender:
        told = json.loads(node.sandbox.run(*weak, str(cookie_of(client))).stdout)
        # What a connect has left is there all the same.
        assert (told["balanced"], told["processes"], told["peer_name"]) == (True, [], f"{WEB}:80")
        sender.sendto(b"?", (DNS, 53))
        result = node.sandbox.run(*weak, str(cookie_of(sender)), check=False)
        assert result.returncode == 1
        assert json.loads(result.stdout)["reasons"][0] == (
            "it is not connected; to which frontends it has sent cannot be seen from here"
        )
        shown = node.sandbox.run(*weak[:-2], str(cookie_of(sender)), check=False).stdout
        assert "it needs CAP_SYS_PTRACE" in shown


# --- no answer ------------------------------------------------------------------------------------


def test_what_is_not_there(node: Node) -> None:
    with open(os.devnull, "rb") as file, socket.socket(socket.AF_UNIX) as local:  # noqa: PTH123
        for what, said in (
            (f"{os.getpid()}:{file.fileno()}", "is no socket but /dev/null"),
            (f"{os.getpid()}:{local.fileno()}", "no table of TCP and UDP sockets"),
            (f"{os.getpid()}:9999", "no such process or descriptor"),
            ("123456789:0", "no such process or descriptor"),
            ("99999999999", "no such TCP or UDP socket"),
            ("10.1.2.3:4>10.1.2.3:5", "no such TCP or UDP socket"),
            ("10.1.2.3:4", "no such TCP or UDP socket"),
        ):
            status, text = complaint(node, what)
            assert (status, said in text) == (1, True), text


def test_what_names_no_socket_or_several(node: Node) -> None:
    for what in ("web", "10.0.0.1", "10.0.0.1:80>", "[::1:80", "10.0.0.999:80", "1:2:3", ""):
        status, text = complaint(node, what)
        assert status == 2, what
        assert "Traceback" not in text
    with (
        socket.create_connection((WEB, 80)) as one,
        socket.create_connection((WEB, 80)) as two,
    ):
        status, text = complaint(node, f"{WEB}:80")
        assert (status, "2 sockets are meant" in text) == (2, True)
        for client in (one, two):
            assert f"{cookie_of(client)} ({text_of(client.getsockname())}>{TCP_BACKEND}" in text


def test_nothing_installed(sandbox: Sandbox) -> None:
    result = sandbox.sockhop("explain", "1:1", check=False)
    assert (result.returncode, "nothing is installed" in result.stderr) == (3, True)
