"""Call paths of an answered and of an unanswered request, and where they part."""

import json
import signal
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from subprocess import PIPE
from typing import NamedTuple

import pytest

from sockhop.datapath.sockets import TCP_STATES
from sockhop.datapath.tracing import Means, TraceKind, Tracer, TraceRecord
from sockhop.diagnose.callpaths import Moment, Side, Verdict, compare, connections
from sockhop.diagnose.trace import Program, Trace, trace
from sockhop.kernel import netns
from sockhop.kernel.symbols import Symbols
from sockhop.model import pack_address
from tests.diagnose.incident import incident
from tests.sandbox import SOCKHOP, Sandbox, compact, wait_until
from tests.splice.stage import Place, Stage

pytestmark = pytest.mark.kernel

ENOUGH = 60.0
"""Seconds for the slowest machine; a trace ends when what it traces does."""
ALL = Program()
LAST_ACK = (TraceKind.STATE, TCP_STATES.index("LAST-ACK") + 1)


class Server:
    """Waits in recv() and answers, in a thread for each connection."""

    def __init__(self, listener: socket.socket) -> None:
        self._listener = listener
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        with suppress(OSError):
            while True:
                made = self._listener.accept()[0]
                threading.Thread(target=self._serve, args=(made,), daemon=True).start()

    def _serve(self, made: socket.socket) -> None:
        with made, suppress(OSError):
            while made.recv(4096):
                made.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nOK")

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join(10)


class Trouble(NamedTuple):
    """A server, and a client's port whose connections get no answer."""

    stage: Stage
    place: Place
    port: int
    taken: int

    def ask(self, port: int = 0) -> None:
        """Send a request from *port*, and wait for its answer; not long where there is none."""
        with self.stage.client(self.place, port) as client:
            client.settimeout(0.5 if port == self.taken else ENOUGH)
            client.connect((self.place.target, self.port))
            client.sendall(b"GET / HTTP/1.1\r\n\r\n")
            with suppress(TimeoutError):
                client.recv(100)

    def ask_both(self) -> None:
        self.ask()
        self.ask(self.taken)

    def trace(self, dial: Callable[[], None], most: int = 20_000, of: Program = ALL) -> Trace:
        target = (pack_address(self.place.server), self.port)
        return trace(target, seconds=ENOUGH, most=most, dial=dial, of=of)


@contextmanager
def trouble(place: Place = Place.VETH4) -> Iterator[Trouble]:
    with incident() as at:
        listener = at.listen(place)
        old, taken = at.leave_stale(place, listener)
        at.keep(old)
        server = Server(listener)
        try:
            yield Trouble(at.stage, place, listener.getsockname()[1], taken)
        finally:
            server.close()


def event(moments: list[Moment], name: str) -> Moment:
    return next(each for each in moments if each.event == name)


@pytest.mark.parametrize("place", [Place.VETH4, Place.LOOPBACK6])
def test_the_first_difference(place: Place) -> None:
    with trouble(place) as at:
        found = at.trace(at.ask_both)
    print(found)
    assert found.verdicts == {Verdict.ANSWERED: 1, Verdict.UNANSWERED: 1}
    assert not found.lost
    assert not found.truncated
    assert found.difference is not None
    assert found.difference.side is Side.SERVER
    assert found.difference.called
    first = found.difference.path[0].function
    parts = [(each.function, each.file) for each in found.difference.good + found.difference.bad]
    assert parts == [
        ("tcp_bpf_recvmsg", "net/ipv4/tcp_bpf.c"),
        ("tcp_recvmsg", "net/ipv4/tcp.c"),
    ]
    assert found.answered
    assert found.unanswered
    kept, dropped = (each.life[Side.SERVER] for each in (found.answered, found.unanswered))
    assert event(kept, "state ESTAB").receiver == "tcp_bpf_recvmsg"
    assert event(dropped, "state ESTAB").receiver == "tcp_recvmsg"
    before = [each.event for each in kept[: kept.index(event(kept, "state ESTAB"))]]
    assert "sk_psock_drop" not in before
    if found.means is Means.KPROBES:
        assert [each.function for each in found.difference.path][-1].startswith("inet")
        drop = event(dropped, "sk_psock_drop")
        assert drop.callers[0] in ("sock_hash_update_common", "sk_psock_put")
        assert "tcp_init_transfer" in drop.callers
        assert event(kept, "sk_psock_init").receiver == "tcp_recvmsg"
    else:
        assert first == "sock_recvmsg"
        assert "kprobe" in found.reason


def test_without_a_call_the_handlers_differ() -> None:
    """A server that waits in poll() never comes to recv()."""
    with incident() as at:
        listener = at.listen(Place.VETH4)
        old, taken = at.leave_stale(Place.VETH4, listener)
        at.keep(old)

        def ask() -> None:
            for port in (0, taken):
                client, server = at.connect(Place.VETH4, listener, port)
                client.sendall(b"request")
                with suppress(TimeoutError):
                    server.recv(9)
                    server.sendall(b"answer")
                    client.recv(9)
                client.close()

        target = (pack_address(Place.VETH4.server), listener.getsockname()[1])
        found = trace(target, seconds=ENOUGH, most=20_000, dial=ask)
    print(found)
    assert found.difference
    assert (found.difference.side, found.difference.called) == (Side.SERVER, False)
    parts = [each.function for each in found.difference.good + found.difference.bad]
    assert parts == ["tcp_bpf_recvmsg", "tcp_recvmsg"]


def test_answered_requests_do_not_differ() -> None:
    with trouble() as at:
        target = (pack_address(at.place.server), at.port)
        with Tracer(target) as tracer:
            tracer.start()
            for _ in range(10):
                at.ask()
            records: list[TraceRecord] = []

            def closed() -> bool:
                records.extend(tracer.records())
                ends = [each for each in records if (each.kind, each.value) == LAST_ACK]
                return len({each.remote_port for each in ends}) == 10

            wait_until(closed, "the server's close of each")
            found = connections(records, target)
            symbols = Symbols()
    assert [each.verdict for each in found] == [Verdict.ANSWERED] * 10
    assert all(len(each.ends) == 2 for each in found)
    differences = [compare(found[0], each, symbols) for each in found[1:]]
    differences += [compare(each, found[0], symbols) for each in found[1:]]
    assert not any(differences), differences


def test_what_is_kept() -> None:
    """No more than asked for, and nothing of others."""
    with trouble() as at:
        short = at.trace(at.ask, most=5)
        assert (short.records, short.truncated) == (5, True)
        own = at.trace(at.ask, of=Program(command=Path("/proc/self/comm").read_text().strip()))
        assert own.verdicts == {Verdict.ANSWERED: 1}
        assert own.difference is None
        assert own.unanswered is None
        others = at.trace(at.ask, of=Program(pid=1))
        assert others.records
        assert not others.verdicts


def run(at: Trouble, *arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [str(SOCKHOP), "trace", "path", f"{at.place.server}:{at.port}", *arguments]
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=120)


def test_the_command() -> None:
    with trouble() as at:
        with netns.entered(at.stage.other):
            # The client has four ports, each for one connection, and one is the stale entry's.
            settings = Path("/proc/sys/net/ipv4")
            (settings / "ip_local_port_range").write_text(f"{at.taken} {at.taken + 3}")
            (settings / "tcp_tw_reuse").write_text("0")
        from_far = ("--from", str(at.stage.other))
        patience = ("--timeout", "2s", "--for", f"{ENOUGH}s")
        found = run(at, "--http", "/health", *from_far, "--count", "4", *patience)
        nothing = run(at, "--for", "100ms", "-o", "json")
    print(found.stdout, found.stderr)
    assert found.returncode == 1
    assert "connections: 3 answered, 1 not answered" in found.stdout
    told = found.stdout[found.stdout.index("first difference, at the server's end") :]
    first = told.split("\n\n")[0]
    assert "answered:     tcp_bpf_recvmsg (net/ipv4/tcp_bpf.c)" in first
    assert "not answered: tcp_recvmsg (net/ipv4/tcp.c)" in first
    assert nothing.returncode == 0, nothing.stderr
    empty = json.loads(nothing.stdout)
    assert (empty["verdicts"], empty["difference"]) == ({}, None)


def test_an_interrupt_ends_it() -> None:
    command = [str(SOCKHOP), "trace", "path", "10.77.0.1:9", "--for", f"{ENOUGH}s"]
    with subprocess.Popen(command, stdout=PIPE, stderr=PIPE, text=True) as running:
        assert running.stderr
        assert running.stderr.readline() == "tracing 10.77.0.1:9; Ctrl-C ends it\n"
        running.send_signal(signal.SIGINT)
        told, errors = running.communicate(timeout=ENOUGH)
    assert (running.returncode, errors) == (0, "")
    assert "connections: none" in told


def test_a_frontend_has_no_connections(sandbox: Sandbox, tmp_path: Path) -> None:
    manifest = tmp_path / "services.yaml"
    service = {"frontends": ["10.96.0.1:80"], "backends": ["127.0.0.1:8080"]}
    manifest.write_text(compact(web=service))
    with sandbox.agent(manifest):
        told = sandbox.sockhop("trace", "path", "10.96.0.1:80", "--for", "10ms").stdout
    assert "10.96.0.1:80 is a frontend" in told
    assert "its backends, 127.0.0.1:8080; trace one of those" in told


def test_where_symbols_are_hidden() -> None:
    without = ("setpriv", "--bounding-set", "-syslog", "--inh-caps", "-syslog")
    shown, done = (
        subprocess.run(
            [*without, *command], check=False, capture_output=True, text=True, timeout=60
        )
        for command in (
            ("tail", "-n1", "/proc/kallsyms"),
            (str(SOCKHOP), "trace", "path", "10.77.0.1:9", "--for", "100ms"),
        )
    )
    # kernel.kptr_restrict and kernel.perf_event_paranoid may let everybody see them.
    if int(shown.stdout.split()[0], 16):
        assert done.returncode == 0, done.stderr
    else:
        assert done.returncode == 3
        assert "/proc/kallsyms hides where functions are" in done.stderr
        assert "tracing" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["10.0.0.1"], "no address with a port"),
        (["10.0.0.1:80", "--http", "health"], "no path"),
        (["10.0.0.1:80", "--http", "/", "--from", "nowhere"], "--from nowhere"),
        (["10.0.0.1:80", "--from", "host"], "give --http, too"),
    ],
)
def test_bad_input(arguments: list[str], says: str) -> None:
    command = [str(SOCKHOP), "trace", "path", *arguments]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert says in done.stderr
