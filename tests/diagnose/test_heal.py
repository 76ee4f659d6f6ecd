"""Stale entries are deleted, and nothing else is."""

import json
import os
import random
import socket
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from sockhop.agent.events import EventKind, EventLog, events_path
from sockhop.datapath.sockets import read_iterator
from sockhop.diagnose.heal import Outcome, advice, heal, plan
from sockhop.kernel._libbpf import ffi, lib
from tests.diagnose.crowd import crowd, held_under_own_key
from tests.diagnose.incident import Incident, incident, reset
from tests.diagnose.invoke import sockhop
from tests.mutants import mutant
from tests.splice.stage import Place

pytestmark = pytest.mark.kernel

HEALS = int(os.environ.get("SOCKHOP_HEALS", "12"))
LIVE = int(os.environ.get("SOCKHOP_LIVE", "200"))


def holder(at: Incident, key: bytes) -> int:
    """Return the cookie of the socket under a key, 0 if there is none."""
    value = ffi.new("__u64 *")
    return int(value[0]) if lib.bpf_map_lookup_elem(at.map.fd, key, value) == 0 else 0


def cookie(of: socket.socket) -> int:
    return int.from_bytes(of.getsockopt(socket.SOL_SOCKET, 57, 8), "little")


@pytest.mark.parametrize("place", [each for each in Place if each is not Place.MAPPED])
def test_the_incident_is_found_and_cured(place: Place) -> None:
    with incident() as at:
        _, old, client, server = at.stuck(place)
        audits, pairs = at.examine()
        ours = [each for each in pairs.half_spliced if each.harmful]
        assert [each.victim.handler for each in ours] == ["tcp"]
        command = Path("/proc/self/comm").read_text().strip()
        assert ours[0].victim.processes == [f"{command}/{os.getpid()}"]
        assert "stale: closed" in ours[0].cause
        assert ours[0].still

        (planned,) = plan(audits)
        assert (planned.outcome, planned.lost) == (Outcome.UNREAD, len("request"))
        assert [each.outcome for each in plan(audits, lose_unread=True)] == [Outcome.WOULD]
        assert [each.outcome for each in heal(audits)] == [Outcome.UNREAD]
        assert at.audit().result.stale_closed == 1

        (done,) = heal(audits, lose_unread=True)
        assert (done.outcome, done.lost) == (Outcome.DELETED, len("request"))
        assert "are kept open by" in advice([done])[0]
        client.sendall(b"another")
        assert server.recv(9) == b"another"
        assert not at.audit().result.stale_entries
        assert [each.outcome for each in heal(audits)] == [Outcome.GONE]
        old.close()


def test_a_stale_entry_that_no_program_finds() -> None:
    """The client is an IPv6 socket: what it sends is looked for under a mapped address."""
    with incident() as at:
        listener = at.listen(Place.MAPPED)
        _, port = at.leave_stale(Place.MAPPED, listener)
        client, server = at.connect(Place.MAPPED, listener, port)
        client.sendall(b"request")
        assert server.recv(9) == b"request"
        _, pairs = at.examine()
        assert not pairs.findings


def test_the_program_may_still_read_what_is_unread() -> None:
    with incident() as at:
        listener = at.listen(Place.LOOPBACK4)
        client, server = at.connect(Place.LOOPBACK4, listener)
        client.sendall(b"last words")
        reset(client)
        at.keep(server)
        time.sleep(0.1)
        audits = [at.audit()]
        assert [each.outcome for each in heal(audits)] == [Outcome.UNREAD]
        with suppress(ConnectionResetError):
            assert server.recv(20) == b"last words"
        assert [each.outcome for each in heal([at.audit()])] == [Outcome.DELETED]


def replaced(at: Incident, path: Path | None = None) -> tuple[bool, list[Outcome]]:
    """Give the tuple of a stale entry to a new connection between the looks and the deletion.

    Return whether its entry is still there, and the outcomes.
    """
    listener = at.listen(Place.LOOPBACK4)
    old, port = at.leave_stale(Place.LOOPBACK4, listener)
    audits = [at.audit()]
    (key,) = audits[0].stale
    old.close()
    client, server = at.connect(Place.LOOPBACK4, listener, port)
    assert holder(at, key) == cookie(server)
    outcomes = [each.outcome for each in heal(audits, path=path)]
    kept = holder(at, key) == cookie(server)
    client.sendall(b"over")
    assert server.recv(9) == b"over"
    return kept, outcomes


def test_an_entry_that_was_replaced_stays() -> None:
    with incident() as at:
        assert replaced(at) == (True, [Outcome.CHANGED])


def test_without_the_second_look_it_would_go(tmp_path: Path) -> None:
    blind = mutant(tmp_path, "heal", ("	if (!is_as_before(doom, &now)) {", "	if (0) {"))
    with incident() as at:
        assert replaced(at, blind) == (False, [Outcome.DELETED])


def test_without_a_look_at_the_queue_bytes_are_lost(tmp_path: Path) -> None:
    hasty = mutant(
        tmp_path,
        "heal",
        ("	if ((now.spliced || out.record.more) && !doom->lose) {", "	if (0) {"),
    )
    with incident() as at:
        at.stuck(Place.LOOPBACK4)
        assert [each.outcome for each in heal([at.audit()], path=hasty)] == [Outcome.DELETED]


LOOK_AND_DELETION = (
    (
        "static __always_inline bool is_as_before",
        """static __u32 closed_for;

static long pause(__u32 number, struct sock **sk)
{
	if (BPF_CORE_READ(*sk, sk_socket))
		return number >= 1 << 21;
	return ++closed_for >= 1 << 21;
}

static __always_inline bool is_as_before""",
    ),
    ("	if (!is_linked(key))", "	bpf_loop(1 << 22, pause, &sk, 0);\n	if (!is_linked(key))"),
)
"""What lets much happen between the two."""


def closed_while_healing(at: Incident, path: Path, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Close the socket of a stale entry between the look and the deletion, and have its tuple used.

    Return whether the new connection has the entries still that it had; nothing else is lost.
    """
    listener = at.listen(Place.LOOPBACK4)
    old, port = at.leave_stale(Place.LOOPBACK4, listener)
    audits = [at.audit()]
    ends: list[socket.socket] = []
    had: list[bool] = []

    def use_it() -> None:
        time.sleep(0.02)  # the program is running
        old.close()
        ends.extend(at.connect(Place.LOOPBACK4, listener, port))
        had.extend(held_under_own_key(at.map.fd, each) for each in ends)

    def read(link: int, name: str) -> bytes:
        with ThreadPoolExecutor(1) as pool:
            using = pool.submit(use_it)
            data = read_iterator(link, name)
            using.result()
        return data

    monkeypatch.setattr("sockhop.diagnose.heal.read_iterator", read)
    heal(audits, path=path)
    has = [held_under_own_key(at.map.fd, each) for each in ends]
    for one, other in (ends, ends[::-1]):
        one.sendall(b"over")
        assert other.recv(9) == b"over"
    return has == had


def test_an_entry_that_is_replaced_after_the_look_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = mutant(tmp_path, "heal", *LOOK_AND_DELETION)
    with incident() as at:
        for _ in range(3):
            assert closed_while_healing(at, slow, monkeypatch)


def test_without_the_last_look_it_would_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blind = ("	return next == node;", "	return true;")
    slow = mutant(tmp_path, "heal", *LOOK_AND_DELETION, blind)
    with incident() as at:
        assert not all(closed_while_healing(at, slow, monkeypatch) for _ in range(10))


class Churn:
    """Connections that come and go on a few tuples, and leave stale entries for a while."""

    def __init__(self, at: Incident, seed: int) -> None:
        self._at = at
        self._random = random.Random(seed)
        self._listener = at.listen(Place.LOOPBACK4)
        self.faults: list[str] = []
        self.count = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> "Churn":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                self._one()
        except Exception as error:  # noqa: BLE001 (told by the test)
            self.faults.append(f"{type(error).__name__}: {error}")

    def _one(self) -> None:
        at, port = self._at, 0
        for _ in range(3):
            client = at.stage.client(Place.LOOPBACK4, port)
            client.connect(self._listener.getsockname())
            server = self._listener.accept()[0]
            port = client.getsockname()[1]
            for each in (client, server):
                each.settimeout(2)
            ends = (client, server)
            inside = [held_under_own_key(at.map.fd, each) for each in ends]
            for text in (b"one", b"two", b"three"):
                for one, other in (ends, ends[::-1]):
                    one.sendall(text)
                    try:
                        if other.recv(9) != text:
                            self.faults.append("other bytes")
                    except TimeoutError:
                        end = "server" if other is server else "client"
                        self.faults.append(f"the {end} waits for {text!r}, {inside} {self._odd()}")
            if inside != [held_under_own_key(at.map.fd, each) for each in ends]:
                self.faults.append("an entry was lost")
            self.count += 1
            # The server's entry is stale until its socket is closed, or it is healed.
            reset(client)
            time.sleep(self._random.choice((0, 0.001, 0.01, 0.03, 0.3)))
            server.close()

    def _odd(self) -> list[str]:
        found = (each.described() for each in self._at.audit(0).look.odd)
        return [f"{e.local} {e.remote} {e.state} {e.socket_remote} {e.unread}" for e in found]


def test_nothing_is_lost_while_connections_come_and_go() -> None:
    outcomes: Counter[Outcome] = Counter()
    with incident() as at, ExitStack() as stack:
        command, listener = at.stage.sandbox.inside(), at.listen(Place.LOOPBACK4)
        crowds = [stack.enter_context(crowd(command, at.map.info.id, LIVE // 2)) for _ in range(2)]
        with Churn(at, 1) as one, Churn(at, 2) as two:
            for _ in range(HEALS):
                old, _ = at.leave_stale(Place.LOOPBACK4, listener)
                outcomes.update(each.outcome for each in heal([at.audit(wait=0.002)]))
                old.close()
        stack.close()
        opened = one.count + two.count + sum(each["opened"] for each in crowds)
        print(dict(outcomes), opened, [each["uses"] for each in crowds])
        assert not one.faults + two.faults
        assert not any(each["faults"] for each in crowds)
        assert all(each["uses"] and each["opened"] > LIVE // 2 for each in crowds)
        assert outcomes[Outcome.DELETED] >= HEALS
        assert opened >= 10 * HEALS


def test_the_command() -> None:
    with incident() as at:
        sandbox = at.stage.sandbox
        only = ("--id", str(at.map.info.id), "--wait", "50ms")
        healthy = sockhop(sandbox, "heal", *only)
        assert "nothing to heal" in healthy.stdout
        *_, client, server = at.stuck(Place.VETH4)
        dry = sockhop(sandbox, "heal", *only, "--lose-unread")
        assert dry.returncode == 1
        assert "would delete" in dry.stdout
        assert "nothing was changed" in dry.stdout
        left = sockhop(sandbox, "heal", *only, "--yes")
        assert left.returncode == 1
        assert "--lose-unread deletes also those" in left.stdout
        done = sandbox.sockhop("heal", *only, "--yes", "--lose-unread", "--sever-victims")
        assert "1 of 1 stale entry deleted" in done.stdout
        with pytest.raises(ConnectionAbortedError):
            server.recv(1)
        with pytest.raises(ConnectionResetError):
            client.recv(1)
        events = list(EventLog(events_path(sandbox.api)).read())
        assert [each.kind for each in events] == [EventKind.HEALED, EventKind.SEVERED]
        assert "7 unread bytes lost" in events[0].reason
        client.close()  # it was reset, so its own entry is stale while it is open
        told = json.loads(sockhop(sandbox, "heal", *only, "-o", "json").stdout)
        assert told["entries"] == []
