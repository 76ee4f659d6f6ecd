"""When a direction is spliced, when it goes back to the stack, and that no byte minds."""

import contextlib
import os
import shutil
import socket
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from sockhop.datapath.splice_records import LaneMode, SpliceReason
from sockhop.datapath.splicer import Sweeper
from sockhop.model import SpliceLimits
from tests.mutants import mutant
from tests.splice.stage import Place, Stage, cookie
from tests.splice.tcpinfo import tcp_info

pytestmark = pytest.mark.kernel

BUDGET = SpliceLimits().budget
PAUSE = float(os.environ.get("SOCKHOP_PAUSE", "2"))


SETTLED = ("#define SETTLED 1000000000ULL", "#define SETTLED 100000000ULL")
"""A sweep that waits a tenth of a second, not a whole one."""
CAN_COMPILE = shutil.which("clang") is not None  # other kernels' machines cannot
WAIT = 0.15 if CAN_COMPILE else 1.1


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    quick = mutant(tmp_path_factory.mktemp("sweep"), "sweep", SETTLED) if CAN_COMPILE else None
    with Stage() as made, Sweeper(made.sandbox.pins, path=quick) as made.sweeper:
        yield made


@contextlib.contextmanager
def pair(stage: Stage, place: Place = Place.LOOPBACK4) -> Iterator[tuple[socket.socket, ...]]:
    client, server = stage.connected(place)
    with client, server:
        for each in (client, server):
            each.settimeout(5)
        yield client, server


def read_exactly(of: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size and (more := of.recv(size - len(data))):
        data += more
    return data


def swept(stage: Stage) -> None:
    """Do what the agent does every second, until what is done with splicing has left."""
    stage.sweeper.sweep()
    time.sleep(WAIT)
    stage.sweeper.sweep()


def test_much_without_an_answer_goes_by_the_stack(stage: Stage) -> None:
    with pair(stage) as (client, server):
        piece = BUDGET // 4
        for _ in range(4):
            client.sendall(b"a" * piece)
            assert read_exactly(server, piece) == b"a" * piece
        assert tcp_info(client).bytes_sent == 0
        server.sendall(b"answer")
        assert client.recv(10) == b"answer"
        for _ in range(4):
            client.sendall(b"b" * piece)
            assert read_exactly(server, piece) == b"b" * piece
        assert tcp_info(client).bytes_sent == 0
        client.sendall(b"too much")
        assert server.recv(10) == b"too much"
        assert tcp_info(client).bytes_sent == 8
        assert stage.lane(client) is LaneMode.STACK
        assert stage.lane(server) is LaneMode.SPLICED


def test_stack_is_final_and_behind_what_was_spliced(stage: Stage) -> None:
    with pair(stage) as (client, server):
        client.sendall(b"spliced ")
        with stage.switched_off():
            client.sendall(b"by the stack ")
        client.sendall(b"and so on")
        assert tcp_info(client).bytes_sent == len(b"by the stack and so on")
        time.sleep(0.1)
        assert read_exactly(server, 30) == b"spliced by the stack and so on"


def test_a_reader_that_never_reads_bounds_its_sender(stage: Stage) -> None:
    def sent(client: socket.socket) -> int:
        total = 0
        client.setblocking(False)
        quiet = time.monotonic()
        while time.monotonic() < quiet + 0.5:
            try:
                total += client.send(b"x" * 16384)
                quiet = time.monotonic()
            except BlockingIOError:
                time.sleep(0.01)
        return total

    with pair(stage) as (client, _):
        spliced = sent(client)
    with stage.switched_off(), pair(stage) as (client, _):
        plain = sent(client)
    assert spliced <= plain + 65536
    # Both ends write and nobody reads: each message is an answer, but the queue is full.
    with pair(stage) as (client, server):
        for _ in range(100):
            client.sendall(b"x" * 1024)
            server.sendall(b"x" * 1024)
        assert stage.lane(client) is stage.lane(server) is LaneMode.STACK
        entries = stage.entries()
        assert entries[cookie(client)].lane.reason == SpliceReason.BACKLOG
        room = server.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF)
        assert entries[cookie(client)].lane.spliced <= room // 2


@pytest.mark.parametrize("size", [2304, 8192])
def test_a_small_receive_buffer_is_not_overrun(stage: Stage, size: int) -> None:
    with pair(stage) as (client, server):
        server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, size)
        room = server.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF)
        for _ in range(20):
            client.sendall(b"x" * 1000)
        assert stage.entries()[cookie(client)].lane.spliced <= room // 2
        assert read_exactly(server, 20_000) == b"x" * 20_000


def test_a_reader_that_pauses_goes_on_without_a_stall(stage: Stage) -> None:
    total = 40_000_000
    with pair(stage) as (client, server):
        sender = threading.Thread(target=lambda: client.sendall(b"x" * total))
        client.settimeout(60)
        sender.start()
        time.sleep(PAUSE)
        longest, got = 0.0, 0
        while got < total:
            before = time.monotonic()
            got += len(server.recv(1 << 18))
            longest = max(longest, time.monotonic() - before)
        sender.join()
    assert longest < 1


def test_both_ways_on_the_stack_leave_the_sockhash(stage: Stage) -> None:
    with pair(stage) as (client, server):
        for one, other in ((client, server), (server, client)):
            one.sendall(b"x" * (BUDGET + 1))
            assert len(read_exactly(other, BUDGET + 1)) == BUDGET + 1
        assert stage.lane(client) is stage.lane(server) is LaneMode.STACK
        swept(stage)
        assert not stage.entries().keys() & {cookie(client), cookie(server)}
        client.sendall(b"still")
        assert server.recv(10) == b"still"
        server.sendall(b"there")
        assert client.recv(10) == b"there"


def test_a_stream_takes_the_other_way_with_it(stage: Stage) -> None:
    with pair(stage) as (client, server):
        for _ in range(40):
            client.sendall(b"x" * 65536)
            read_exactly(server, 65536)
        swept(stage)
        assert not stage.entries().keys() & {cookie(client), cookie(server)}


def test_a_quiet_pair_stays(stage: Stage) -> None:
    with pair(stage) as (client, server):
        client.sendall(b"hello")
        assert server.recv(10) == b"hello"
        swept(stage)
        assert stage.entries().keys() >= {cookie(client), cookie(server)}


def off_and_swept(stage: Stage) -> bytes:
    """Switch off with unread bytes in a queue; return what is read in the end."""
    with pair(stage) as (client, server):
        client.sendall(b"unread")
        with stage.switched_off():
            swept(stage)
            client.sendall(b", then by the stack")
            data = server.recv(6)
            time.sleep(0.1)
            return data + server.recv(100)


def test_off_loses_no_byte(stage: Stage) -> None:
    assert off_and_swept(stage) == b"unread, then by the stack"


def test_off_takes_out_only_empty_queues(stage: Stage) -> None:
    with pair(stage) as (client, server):
        client.sendall(b"unread")
        with stage.switched_off():
            swept(stage)
            assert cookie(server) in stage.entries()
            assert cookie(client) not in stage.entries()
            assert server.recv(10) == b"unread"
            swept(stage)
            assert cookie(server) not in stage.entries()
        assert (client.send(b"x"), server.recv(1)) == (1, b"x")


def test_a_sweep_that_forgets_the_queue_is_noticed(stage: Stage, tmp_path: Path) -> None:
    path = mutant(
        tmp_path,
        "sweep",
        SETTLED,
        ("now - lane->leaving < SETTLED || !has_no_bytes(sk)", "now - lane->leaving < SETTLED"),
    )
    kept = stage.sweeper
    with Sweeper(stage.sandbox.pins, path=path) as stage.sweeper:
        try:
            assert off_and_swept(stage) != b"unread, then by the stack"
        finally:
            stage.sweeper = kept


def test_a_client_whose_server_never_comes_leaves(stage: Stage) -> None:
    with stage.listen(Place.LOOPBACK4, TCP_DEFER_ACCEPT=30) as listener:
        client = stage.client(Place.LOOPBACK4)
        with client:
            client.connect(listener.getsockname())
            assert stage.lane(client) is LaneMode.UNDECIDED
            time.sleep(WAIT)
            swept(stage)
            assert stage.lane(client) is None
            # The server's end comes with the first bytes, and answers by the stack.
            client.sendall(b"late")
            server = listener.accept()[0]
            with server:
                assert server.recv(10) == b"late"
                server.sendall(b"answer")
                assert client.recv(10) == b"answer"


def test_deferred_accept_decides_by_direction(stage: Stage) -> None:
    with stage.listen(Place.LOOPBACK4, TCP_DEFER_ACCEPT=30) as listener:
        client = stage.client(Place.LOOPBACK4)
        with client:
            client.connect(listener.getsockname())
            client.sendall(b"wakes it")
            server = listener.accept()[0]
            with server:
                server.sendall(b"answer")
                assert (server.recv(10), client.recv(10)) == (b"wakes it", b"answer")
                assert stage.lane(client) is LaneMode.STACK
                assert stage.lane(server) is LaneMode.SPLICED
                # What comes by the stack is an answer, too.
                for _ in range(6):
                    server.sendall(b"x" * (BUDGET // 4))
                    assert len(read_exactly(client, BUDGET // 4)) == BUDGET // 4
                    client.sendall(b"more")
                    assert server.recv(10) == b"more"
                assert stage.lane(server) is LaneMode.SPLICED


@pytest.mark.parametrize("place", [Place.LOOPBACK4, Place.LOOPBACK6])
def test_fast_open_data_is_not_overtaken(stage: Stage, place: Place) -> None:
    with stage.listen(place, TCP_FASTOPEN=10) as listener:
        where = listener.getsockname()[:2]
        for _ in range(2):  # the first asks for the cookie
            with stage.client(place) as client:
                client.sendto(b"in the SYN, ", socket.MSG_FASTOPEN, where)
                server = listener.accept()[0]
                with server:
                    time.sleep(0.05)
                    client.sendall(b"after it")
                    assert read_exactly(server, 20) == b"in the SYN, after it"


def late_send(stage: Stage) -> bytes:
    """A send() that waits for the connection goes by the stack; the next one comes after it."""
    with stage.listen(Place.VETH4) as full:
        full.listen(0)
        other = [stage.client(Place.VETH4) for _ in range(2)]
        for each in other[:1]:
            each.connect((Place.VETH4.target, full.getsockname()[1]))
        client = other[1]
        client.setblocking(False)
        client.connect_ex((Place.VETH4.target, full.getsockname()[1]))
        time.sleep(0.2)
        client.setblocking(True)
        first = threading.Thread(target=lambda: client.sendall(b"first, "))
        first.start()
        time.sleep(0.2)
        full.accept()[0].close()
        first.join(10)
        client.sendall(b"second")
        server = full.accept()[0]
        with server:
            time.sleep(0.2)
            server.settimeout(5)
            data = read_exactly(server, 13)
        for each in other:
            each.close()
        return data


def test_a_send_before_the_connection_is_not_overtaken(stage: Stage) -> None:
    assert late_send(stage) == b"first, second"


def test_a_mutant_overtakes_it(tmp_path: Path) -> None:
    check = "	if (tp->write_seq != lane->sequence)\n		return SPLICE_SENT_BEFORE;\n"
    with Stage(path=mutant(tmp_path, "splice", (check, ""))) as crippled:
        assert late_send(crippled) == b"secondfirst, "


def handshakes_of_two(path: Path) -> None:
    """Two clients' handshakes in one place, the ends of their servers come later."""
    with (
        Stage(path=path) as stage,
        stage.listen(Place.LOOPBACK4, 22000, TCP_DEFER_ACCEPT=30) as one,
        stage.listen(Place.LOOPBACK4, 22001, TCP_DEFER_ACCEPT=30) as other,
        stage.client(Place.LOOPBACK4, 22002) as first,
        stage.client(Place.LOOPBACK4, 22003) as second,
    ):
        first.connect(one.getsockname())
        second.connect(other.getsockname())
        first.sendall(b"of the first")
        with one.accept()[0] as server:
            server.sendall(b"for the first")
            first.settimeout(2)
            assert (server.recv(100), first.recv(100)) == (b"of the first", b"for the first")
        second.sendall(b"of the second")
        with other.accept()[0] as server:
            server.sendall(b"for the second")
            second.settimeout(2)
            assert (server.recv(100), second.recv(100)) == (b"of the second", b"for the second")
            assert stage.lane(server) is LaneMode.SPLICED


ONE_PLACE = ("#define SPLICE_HANDSHAKES 16384", "#define SPLICE_HANDSHAKES 1")


def test_handshakes_in_one_place(tmp_path: Path) -> None:
    handshakes_of_two(mutant(tmp_path, "splice", ONE_PLACE))


def test_a_mutant_takes_the_other_ones(tmp_path: Path) -> None:
    checks = [(f"!same_key(&pair->key, &{name})", "0") for name in ("key", "lane->key")]
    with pytest.raises((AssertionError, TimeoutError)):
        handshakes_of_two(mutant(tmp_path, "splice", ONE_PLACE, *checks))


def test_a_socket_connected_to_itself(stage: Stage) -> None:
    low, high = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    assert low < high
    made = stage.client(Place.LOOPBACK4)
    with made:
        made.connect(made.getsockname())
        made.settimeout(2)
        for _ in range(3):
            made.sendall(b"myself")
            assert made.recv(10) == b"myself"


def test_same_tuple_in_two_namespaces(stage: Stage) -> None:
    from sockhop.kernel import netns

    for _ in range(2):  # and the next connections on it
        ends = []
        for where in (stage.sandbox.netns, stage.other):
            with netns.entered(where), socket.create_server(("127.0.0.1", 21000)) as listener:
                client = socket.socket()
                client.bind(("127.0.0.1", 21001))
                client.connect(("127.0.0.1", 21000))
                ends.append((client, listener.accept()[0]))
        (a, b), (c, d) = ends
        a.sendall(b"near")
        d.sendall(b"far")
        assert (b.recv(10), c.recv(10)) == (b"near", b"far")
        for each in (b, c):
            each.setblocking(False)
            with pytest.raises(BlockingIOError):
                each.recv(10)
        assert stage.entries().keys() >= {cookie(each) for each in (a, b, c, d)}
        for each in (a, b, c, d):
            each.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            each.close()


def test_bypass_sends_all_by_the_stack(stage: Stage) -> None:
    from sockhop.datapath.balancer import map_directory
    from sockhop.datapath.records import Setting
    from sockhop.kernel.maps import U32, U64, Map, open_pinned

    with (
        pair(stage) as (client, server),
        Map(open_pinned(map_directory(stage.sandbox.pins) / "settings"), U32, U64) as settings,
    ):
        client.sendall(b"spliced")
        settings.set(Setting.BYPASS, 1)
        try:
            client.sendall(b" and not")
            with pair(stage) as (other, _):
                assert stage.lane(other) is None
        finally:
            settings.set(Setting.BYPASS, 0)
        assert read_exactly(server, 15) == b"spliced and not"
        assert tcp_info(client).bytes_sent == 8
