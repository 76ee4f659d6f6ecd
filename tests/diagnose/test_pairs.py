"""Both ends of local connections, and whose functions serve them."""

import contextlib
import socket
import subprocess
from pathlib import Path

import pytest

from sockhop.diagnose.pairs import check_pairs, match_pairs
from sockhop.diagnose.records import AuditFlag, Handler
from sockhop.diagnose.visit import End, Visitor
from sockhop.kernel import netns
from sockhop.kernel.namespaces import Namespace, Namespaces
from tests.diagnose.incident import incident
from tests.sandbox import Sandbox, wait_until
from tests.splice.stage import Place, Stage

pytestmark = pytest.mark.kernel

IPPROTO_MPTCP = 262


def here() -> list[Namespace]:
    """Return the namespace of this thread."""
    return [Namespace(netns.inode(), netns.current_cookie(), Path("/proc/thread-self/ns/net"))]


def connect(kind: int = 0) -> tuple[socket.socket, socket.socket]:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM, kind) as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        client = socket.socket(socket.AF_INET, socket.SOCK_STREAM, kind)
        client.connect(listener.getsockname())
        return client, listener.accept()[0]


def connected(visitor: Visitor) -> list[End]:
    return [each for each in visitor.ends(here()) if each.socket.remote_port]


def test_handlers_of_plain_sockets(sandbox: Sandbox) -> None:
    with Visitor() as visitor:
        client, server = connect()
        with client, server:
            ends = connected(visitor)
            assert len(ends) == 2
            assert {each.socket.handler for each in ends} == {Handler.TCP}
            assert {each.receiver for each in ends} == {"tcp_recvmsg"}


def test_handlers_of_mptcp(sandbox: Sandbox) -> None:
    try:
        client, server = connect(IPPROTO_MPTCP)
    except OSError as error:
        pytest.skip(f"socket(IPPROTO_MPTCP): {error}")
    with client, server, Visitor() as visitor:
        assert {each.socket.handler for each in connected(visitor)} == {Handler.MPTCP}


def test_handlers_of_spliced_sockets() -> None:
    with Stage() as stage, Visitor() as visitor:
        client, server = stage.connected(Place.LOOPBACK6)
        with client, server:
            ends = connected(visitor)
            assert {each.socket.handler for each in ends} == {Handler.TCP_BPF}
            assert {each.receiver for each in ends} == {"tcp_bpf_recvmsg"}
            client.sendall(b"unread")
            (spliced,) = (each.socket.spliced for each in connected(visitor) if each.socket.spliced)
            assert spliced == len(b"unread")


def test_ends_are_matched_in_all_states_of_a_conversation() -> None:
    with Stage(spliced=False) as stage, contextlib.ExitStack() as stack, Visitor() as visitor:
        inodes = {netns.inode(path) for path in (stage.sandbox.netns, stage.other)}
        places = Namespaces().by_inode(inodes)
        wanted = set()
        for place in Place:
            for sent in (b"", b"some", bytes(300_000)):
                client, server = map(stack.enter_context, stage.connected(place))
                wanted.add(server.getpeername()[1])
                client.setblocking(False)
                with contextlib.suppress(BlockingIOError):
                    client.send(sent)
                server.sendall(sent[:9])
        pairs = list(match_pairs(visitor.ends(places)))
        assert {each.socket.local_port for pair in pairs for each in pair} >= wanted
        assert len(pairs) == 15
        for one, other in pairs:
            assert one.socket.local == other.socket.remote


def test_the_same_addresses_in_two_namespaces(sandbox: Sandbox) -> None:
    """Four sockets with the same two addresses and ports: two connections."""
    far = f"{sandbox.name}-far"
    subprocess.run(["ip", "netns", "add", far], check=True)
    try:
        subprocess.run(["ip", "-n", far, "link", "set", "lo", "up"], check=True)
        paths = (sandbox.netns, sandbox.netns.with_name(far))
        ends, kept = [], []
        with Visitor() as visitor:
            for path in paths:
                with netns.entered(path):
                    listener = socket.create_server(("127.0.0.1", 7777))
                    client = socket.create_connection(
                        ("127.0.0.1", 7777), source_address=("127.0.0.1", 7778)
                    )
                    kept += [listener, client, listener.accept()[0]]
            for path in paths:
                with netns.entered(path):
                    ends += connected(visitor)
        assert len(ends) == 4
        for one, other in match_pairs(ends):
            assert one.socket.netns == other.socket.netns
        assert len(list(match_pairs(ends))) == 2
        for each in kept:
            each.close()
    finally:
        subprocess.run(["ip", "netns", "del", far], check=True)


def test_one_end_in_a_map_harms_nobody() -> None:
    """A stale entry that is gone leaves its victim with plain handlers, and all bytes arrive."""
    with incident() as at:
        listener = at.listen(Place.LOOPBACK4)
        old, port = at.leave_stale(Place.LOOPBACK4, listener)
        client, server = at.connect(Place.LOOPBACK4, listener, port)
        old.close()
        client.sendall(b"request")
        assert server.recv(9) == b"request"
        _, pairs = at.examine()
        (half,) = pairs.half_spliced
        assert not half.harmful
        assert half.spliced.handler is Handler.TCP_BPF
        assert half.victim.handler is Handler.TCP
        assert pairs.findings == 0


def test_what_nobody_reads(sandbox: Sandbox) -> None:
    with Visitor() as visitor:
        (lazy, sender), (busy, other), (ended, gone) = connect(), connect(), connect()
        with lazy, sender, busy, other, ended:
            gone.close()  # a FIN is no byte
            sender.sendall(b"never read")
            other.sendall(b"read later")
            first = connected(visitor)
            assert busy.recv(4) == b"read"
            check = check_pairs(first, connected(visitor), [])
            assert [each.stack for each in check.queued] == [len(b"never read")]


def test_what_nobody_reads_of_spliced_bytes() -> None:
    """As many bytes may wait at both looks, and yet be others."""
    with Stage() as stage, Visitor() as visitor:
        (lazy, sender), (busy, other) = (stage.connected(Place.LOOPBACK4) for _ in range(2))
        with lazy, sender, busy, other:
            for each in (sender, other):
                each.sendall(b"first")
                each.sendall(b"again")
            wait_until(lambda: _spliced(visitor) == [10, 10], "the bytes")
            first = connected(visitor)
            sender.sendall(b"more")
            assert busy.recv(2) == b"fi"
            other.sendall(b"xx")
            wait_until(lambda: _spliced(visitor) == [10, 14], "the bytes")
            check = check_pairs(first, connected(visitor), [])
            assert [each.spliced for each in check.queued] == [14]


def _spliced(visitor: Visitor) -> list[int]:
    return sorted(each.socket.spliced for each in connected(visitor) if each.socket.spliced)


def test_flags_of_a_psock() -> None:
    with Stage() as stage, Visitor() as visitor:
        client, server = stage.connected(Place.LOOPBACK4)
        with client, server:
            for each in connected(visitor):
                assert AuditFlag(each.socket.flags) == (
                    AuditFlag.PSOCK | AuditFlag.HANDLERS | AuditFlag.PARSER
                )
