"""Each cause set up for real: the right conclusion, and no other."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

from sockhop.diagnose.causes import Cause
from sockhop.diagnose.dial import Question
from sockhop.diagnose.doctor import Diagnosis, diagnose
from sockhop.diagnose.heal import heal
from sockhop.diagnose.matrix import Origin
from sockhop.diagnose.pairs import examine
from sockhop.diagnose.visit import Visitor, open_sockmaps
from sockhop.kernel import netns
from sockhop.kernel._libbpf import lib
from sockhop.kernel.namespaces import Namespace, Namespaces
from sockhop.model import pack_address
from tests.diagnose.incident import Incident, incident, reset
from tests.diagnose.invoke import sockhop
from tests.diagnose.load import SERVER, Load, Server
from tests.sandbox import Sandbox, wait_until
from tests.splice.stage import Place, Stage

pytestmark = pytest.mark.kernel

RUNS = int(os.environ.get("SOCKHOP_DOCTOR_RUNS", "3"))
NOBODY = Path("/nonexistent")


def origin(stage: Stage) -> Origin:
    with netns.entered(stage.other):
        place = Namespace(netns.inode(stage.other), netns.current_cookie(), stage.other)
    return Origin("far", place)


def ask(
    stage: Stage,
    port: int,
    *,
    path: str = "/health",
    count: int = 1,
    timeout: float = 0.8,
    alone: bool = True,
) -> Diagnosis:
    question = Question(pack_address(SERVER), port, path, count, timeout)
    return diagnose(question, [origin(stage)], NOBODY, alone=alone)


def causes(found: Diagnosis) -> list[Cause]:
    return [each.cause for each in found.conclusions]


def because(found: Diagnosis) -> str:
    (only,) = found.conclusions
    return only.because


@pytest.fixture(scope="module")
def stage() -> Iterator[Stage]:
    """One for all tests that leave it as it was."""
    with Stage(spliced=False) as made:
        yield made


@contextmanager
def rules(where: Path, *lines: str) -> Iterator[None]:
    """Have nftables rules in a namespace while the body runs."""
    hooks = ("input", "output")
    chains = [f"chain {h} {{ type filter hook {h} priority 0; }}" for h in hooks]
    text = "\n".join(
        ["table inet test {", *chains, "}", *(f"add rule inet test {x}" for x in lines)]
    )
    with netns.entered(where):
        subprocess.run(["nft", "-f", "-"], input=text, text=True, check=True)
    try:
        yield
    finally:
        with netns.entered(where):
            subprocess.run(["nft", "delete", "table", "inet", "test"], check=True)


def test_healthy(stage: Stage) -> None:
    with Server(stage) as server, Server(stage, answer=bytes(300_000)) as big:
        for port in (server.port, big.port):
            for _ in range(RUNS):
                found = ask(stage, port, count=2, timeout=5)
                assert (found.conclusions, found.dialled[0].failed) == ([], 0)
                assert netns.inode(stage.sandbox.netns) in found.owners
        assert ask(stage, server.port, path="", timeout=5).conclusions == []


@contextmanager
def _by_tuple() -> Iterator[Stage]:
    with incident() as at:
        yield at.stage


@pytest.mark.parametrize("spliced", [True, False], ids=["ours", "by tuple"])
def test_healthy_under_load(spliced: bool) -> None:
    """With splicing of ours, and with a sockhash by tuple of which every socket is closed."""
    with ExitStack() as stack:
        stage = stack.enter_context(Stage() if spliced else _by_tuple())
        visitor = stack.enter_context(Visitor())
        inodes = {netns.inode(stage.sandbox.netns), netns.inode(stage.other)}
        places = Namespaces().by_inode(inodes)
        server = stack.enter_context(Server(stage))
        load = stack.enter_context(Load(stage))
        for _ in range(RUNS):
            assert ask(stage, server.port, count=2, timeout=5).conclusions == []
            with ExitStack() as opened:
                maps = [
                    each
                    for each in open_sockmaps(opened)
                    if each.info.name in ("splice_sockets", "vanilla_sockets")
                ]
                audits, pairs = examine(visitor, maps, wait=0.1, places=places)
            ours = [
                entry
                for each in audits
                if each.result.in_the_way
                for entry in each.result.stale_entries
                if entry.netns in inodes
            ]
            assert (ours, pairs.findings) == ([], 0)
        assert load.count > RUNS


def test_server_not_listening(stage: Stage) -> None:
    found = ask(stage, 7)
    assert causes(found) == [Cause.NOT_LISTENING]
    assert found.dialled[0].percent == 100
    assert str(netns.inode(stage.sandbox.netns)) in because(found)


def test_a_server_of_the_other_family(stage: Stage) -> None:
    with netns.entered(stage.sandbox.netns):
        for where, only, asked in (("0.0.0.0", 0, Place.VETH6.server), ("::", 1, SERVER)):
            family = socket.AF_INET6 if ":" in where else socket.AF_INET
            with socket.socket(family) as server:
                if only:
                    server.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                server.bind((where, 7071))
                server.listen()
                question = Question(pack_address(asked), 7071, count=1)
                found = diagnose(question, [origin(stage)], NOBODY, alone=True)
                assert causes(found) == [Cause.NOT_LISTENING]
    with rules(stage.sandbox.netns, "input tcp dport 7072 reject with tcp reset"):
        with netns.entered(stage.sandbox.netns):
            dual = socket.create_server(("::", 7072), family=socket.AF_INET6, dualstack_ipv6=True)
        with dual:
            assert causes(ask(stage, 7072)) == [Cause.FILTERED]


def test_server_not_accepting(stage: Stage) -> None:
    with ExitStack() as stack:
        listener = stack.enter_context(stage.listen(Place.VETH4))
        listener.listen(1)
        port = listener.getsockname()[1]
        found = ask(stage, port)
        assert causes(found) == [Cause.NOT_ACCEPTING]
        assert "waits to be accepted" in because(found)
        for _ in range(4):
            client = stack.enter_context(stage.client(Place.VETH4))
            client.setblocking(False)
            with suppress(BlockingIOError):
                client.connect((SERVER, port))
        wait_until(lambda: _queue(port) == 2, "a full queue")
        found = ask(stage, port)
        assert causes(found) == [Cause.NOT_ACCEPTING]
        assert "2 of 2 places of its queue are taken" in because(found)


def _queue(port: int) -> int:
    told = subprocess.run(
        ["ss", "-Hltn", f"sport = :{port}"], check=True, capture_output=True, text=True
    )
    return int(told.stdout.split()[1])


def test_a_stopped_server(stage: Stage) -> None:
    script = f"import socket; s = socket.create_server(({SERVER!r}, 7070)); input()"
    inside = stage.sandbox.inside(sys.executable, "-c", script)
    with subprocess.Popen(inside, stdin=subprocess.PIPE) as process:
        try:
            wait_until(lambda: _queue_of_listener(7070), "the server")
            process.send_signal(signal.SIGSTOP)
            found = ask(stage, 7070)
            assert causes(found) == [Cause.NOT_ACCEPTING]
            assert f"/{process.pid} (it is stopped)" in because(found)
        finally:
            process.kill()


def _queue_of_listener(port: int) -> str:
    told = subprocess.run(
        ["ss", "-Hltn", f"sport = :{port}"], check=True, capture_output=True, text=True
    )
    return told.stdout


@pytest.mark.parametrize(
    ("does", "said"),
    [
        ("nothing", "has read it, and says nothing"),
        ("not read", "has not read"),
        ("close", "closed by the server"),
    ],
)
def test_server_accepts_and_does_not_answer(stage: Stage, does: str, said: str) -> None:
    with Server(stage, does) as server:
        found = ask(stage, server.port)
        assert causes(found) == [Cause.NOT_ANSWERING]
        assert said in because(found)
        if does == "not read":
            (asked,) = re.findall(r"has not read (\d+) bytes", because(found))
            assert int(asked) == len(Question(pack_address(SERVER), server.port, "/health").request)


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        ("input tcp dport {port} drop", "where a server listens with room in its queue"),
        ("input tcp dport {port} reject with tcp reset", "something answers in its place"),
        ("input tcp dport {port} meta length > 60 drop", "the handshake passes, the request"),
        ("output tcp sport {port} meta length > 60 drop", "has answered"),
    ],
)
def test_filtered_on_the_way(stage: Stage, rule: str, said: str) -> None:
    with Server(stage, "answer and wait") as server:
        with rules(stage.sandbox.netns, rule.format(port=server.port)):
            found = ask(stage, server.port)
        assert causes(found) == [Cause.FILTERED]
        assert said in because(found)
        assert ask(stage, server.port, timeout=5).conclusions == []


def test_nobody_has_the_address(stage: Stage) -> None:
    question = Question(pack_address("10.77.0.99"), 80, count=1, timeout=0.3)
    found = diagnose(question, [origin(stage)], NOBODY)
    assert causes(found) == [Cause.FILTERED]
    assert "no network namespace of this node has the address" in because(found)
    question = Question(pack_address("203.0.113.1"), 80, count=1, timeout=0.3)
    found = diagnose(question, [origin(stage)], NOBODY)
    assert causes(found) == [Cause.NO_ROUTE]


def test_mtu_black_hole(stage: Stage) -> None:
    with netns.entered(stage.sandbox.netns):
        # Segments as they go over a wire.
        subprocess.run(["ip", "link", "set", "near", "gso_max_segs", "1"], check=True)
    with Server(stage, "answer and wait", bytes(4000)) as server:
        rule = f"output tcp sport {server.port} meta length > 1000 drop"
        with rules(stage.sandbox.netns, rule):
            assert causes(ask(stage, server.port)) == [Cause.MTU]


@contextmanager
def few_ports(stage: Stage, number: int) -> Iterator[list[int]]:
    """Leave the clients of doctor only so many ports while the body runs, these."""
    ports = list(range(30000, 30000 + number))
    before = _set_ports(stage, f"{ports[0]} {ports[-1]}")
    try:
        yield ports
    finally:
        _set_ports(stage, before)


def _set_ports(stage: Stage, ports: str) -> str:
    path = Path("/proc/sys/net/ipv4/ip_local_port_range")
    with netns.entered(stage.other):
        before = path.read_text()
        path.write_text(ports)
    return before


def test_stale_sockmap_entry() -> None:
    with incident() as at, Server(at.stage, "nothing") as server:
        with few_ports(at.stage, 4) as ports:
            for port in ports:
                client = at.stage.client(Place.VETH4, port)
                client.connect((SERVER, server.port))
                client.sendall(b"ping")
                wait_until(lambda: _unread(at) == 0, "the server to read")
                reset(client)
            wait_until(lambda: at.audit(0).result.stale_closed == 4, "stale entries")
            server.does = "answer"
            found = ask(at.stage, server.port, count=2, alone=False)
        assert causes(found) == [Cause.STALE_ENTRY], found
        text = "\n".join(found.evidence)
        assert "from far TCP connects every time" in text
        assert f"from {at.stage.sandbox.name}, which has the address all succeed" in text
        assert found.dialled[0].percent == 100
        assert "(stale: closed)" in because(found)
        assert "(tcp_bpf) splices to it, and not to" in because(found)
        assert f"/{os.getpid()}" in because(found)
        assert "no segment moves: segs_out stays " in because(found)
        assert re.search(r"\d+ bytes wait there, where nobody expects them", because(found))
        heal([at.audit()], lose_unread=True)
        found = ask(at.stage, server.port, count=1000, timeout=10)
        assert found.dialled[0].results == {"answered": 1000}


def _unread(at: Incident) -> int:
    return sum(each.socket.spliced for each in at.audit(0).look.all())


def test_no_free_local_port(stage: Stage) -> None:
    with (
        few_ports(stage, 1) as (port,),
        Server(stage, "nothing") as server,
        stage.client(Place.VETH4, port) as client,
    ):
        client.connect((SERVER, server.port))
        assert causes(ask(stage, server.port)) == [Cause.NO_PORT]


def test_half_spliced_pair() -> None:
    """Two namespaces use the same addresses, and one map; in one an end is not in it."""
    with incident() as at, ExitStack() as stack:
        (port,) = stack.enter_context(few_ports(at.stage, 1))
        _, held = (stack.enter_context(each) for each in _connection(("127.0.0.1", 7777), port))
        (key,) = (
            each.key
            for each in at.audit(0).look.all()
            if each.ends.local_port == port and each.ends.remote_port == 7777
        )
        assert lib.bpf_map_delete_elem(at.map.fd, key) == 0
        with netns.entered(at.stage.other):
            listener = socket.create_server(("127.0.0.1", 7777))
        with Server(at.stage, listener=listener):
            question = Question(pack_address("127.0.0.1"), 7777, "/health", 1, 0.4)
            found = diagnose(question, [origin(at.stage)], NOBODY)
        assert causes(found) == [Cause.HALF_SPLICED]
        assert "another connection with the same addresses" in because(found)
        assert held.recv(4096) == question.request  # it went to the wrong one


def _connection(to: tuple[str, int], port: int) -> tuple[socket.socket, socket.socket]:
    with socket.create_server(to) as listener:
        client = socket.create_connection(to, source_address=(to[0], port))
        return client, listener.accept()[0]


def test_no_backend_one_that_is_gone_and_a_policy(sandbox: Sandbox) -> None:
    services = [
        {"name": "none", "frontends": ["10.96.0.1:80/tcp"], "backends": []},
        {"name": "gone", "frontends": ["10.96.0.1:81/tcp"], "backends": ["10.96.0.1:9"]},
    ]
    policy = {"name": "no", "deny": [{"cidr": "127.0.9.0/24"}]}
    text = json.dumps({"version": 1, "services": services, "policies": [policy]})
    with sandbox.agent(sandbox.manifest(text)):
        none, gone, denied = (
            diagnose(Question(pack_address(to), port), [Origin("here", None)], sandbox.pins)
            for to, port in (("10.96.0.1", 80), ("10.96.0.1", 81), ("127.0.9.1", 80))
        )
    assert causes(none) == [Cause.NO_BACKEND]
    assert causes(gone) == [Cause.BACKEND_GONE]
    assert "the backend 10.96.0.1:9, dialled by itself: refused" in because(gone)
    assert causes(denied) == [Cause.DENIED]


def test_the_command(stage: Stage) -> None:
    far = stage.other.name
    with Server(stage) as server:
        target = f"{SERVER}:{server.port}"
        options = ("--from", far, "--http", "/health", "--timeout", "500ms")
        healthy = stage.sandbox.sockhop("doctor", target, *options)
        assert "nothing is wrong: 5 connections of 5 succeed" in healthy.stdout
        told = json.loads(sockhop(stage.sandbox, "doctor", target, *options, "-o", "json").stdout)
        assert told["dialled"][0]["results"] == {"answered": 5}
    sick = sockhop(stage.sandbox, "doctor", target, *options)
    assert sick.returncode == 1
    assert "server not listening (from " in sick.stdout
    assert "do: start the server" in sick.stdout
    for wrong, said in (
        (("10.0.0.1",), "is no address with a port"),
        (("10.0.0.1:0",), "is no address with a port"),
        (("name:80",), "is no address with a port"),
        ((target, "--http", "x y"), "is no path"),
        ((target, "--from", "nowhere"), "No such file"),
    ):
        failed = sockhop(stage.sandbox, "doctor", *wrong)
        assert failed.returncode == 2
        assert said in failed.stderr
