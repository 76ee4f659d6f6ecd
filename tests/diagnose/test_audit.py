"""Entries against the sockets that they hold, on the live kernel."""

import json
import socket
import struct
import time
from contextlib import ExitStack

import pytest

from sockhop.diagnose.audit import EntryState, audit, look
from sockhop.diagnose.keys import parse_key
from sockhop.diagnose.visit import Visitor, open_sockmap
from sockhop.errors import InputError
from sockhop.model import pack_address
from tests.diagnose.incident import incident, insert, is_closed, new_map, reset
from tests.diagnose.invoke import sockhop
from tests.sandbox import Sandbox, wait_until
from tests.splice.stage import Place, Stage

pytestmark = pytest.mark.kernel


def pair() -> tuple[socket.socket, socket.socket]:
    """Return both ends of a connection in this namespace."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = socket.create_connection(listener.getsockname())
        return client, listener.accept()[0]


def packed(of: socket.socket) -> tuple[bytes, bytes, bytes, bytes]:
    """Return a socket's addresses and ports in network order."""
    (here, port), (there, peer) = of.getsockname()[:2], of.getpeername()[:2]
    return (
        *(socket.inet_aton(here), socket.inet_aton(there)),
        *(port.to_bytes(2, "big"), peer.to_bytes(2, "big")),
    )


def test_live_entries_and_stale_ones() -> None:
    with incident() as at:
        for place in Place:
            at.connect(place, at.listen(place))
        found = at.audit().result
        assert (found.keys, found.entries, found.live) == ("addresses-ports", 10, 10)
        assert not found.stale_entries
        for place in Place:
            at.leave_stale(place, at.listen(place))
        found = at.audit().result
        assert (found.entries, found.live, found.stale_closed, found.stale_other) == (15, 10, 5, 0)
        assert {each.state for each in found.stale_entries} == {EntryState.CLOSED}
        assert {each.socket_state for each in found.stale_entries} == {"CLOSE"}
        assert all(each.inode and each.local != each.socket_local for each in found.stale_entries)
        count = {row.address: (row.entries, row.stale) for row in found.addresses}
        assert count["127.0.0.1"] == (3, 1)
        assert count["10.77.0.1"] == (6, 2), count


def test_a_socket_that_went_elsewhere() -> None:
    with incident() as at:
        first, second = at.listen(Place.LOOPBACK4), at.listen(Place.LOOPBACK4)
        client, _ = at.connect(Place.LOOPBACK4, first)
        disconnect = socket.AF_UNSPEC.to_bytes(2, "little") + bytes(14)
        assert _connect(client, disconnect) == 0
        client.connect(second.getsockname())
        at.keep(second.accept()[0])
        found = at.audit().result
        assert (found.stale_other, found.stale_closed) == (1, 1)  # the server was reset
        (entry,) = (each for each in found.stale_entries if each.state is EntryState.OTHER)
        assert entry.remote == f"127.0.0.1:{first.getsockname()[1]}"
        assert entry.socket_remote == f"127.0.0.1:{second.getsockname()[1]}"


def _connect(of: socket.socket, address: bytes) -> int:
    import ctypes

    return ctypes.CDLL(None).connect(of.fileno(), address, len(address))  # type: ignore[no-any-return]


def test_what_changes_between_the_looks_is_no_finding() -> None:
    with incident() as at:
        listener = at.listen(Place.LOOPBACK4)
        old, _ = at.leave_stale(Place.LOOPBACK4, listener)
        first = look(at.visitor, at.map)
        assert len(first.stale) == 1
        old.close()
        assert not look(at.visitor, at.map).stale


def layouts(of: socket.socket) -> dict[str, tuple[str, bytes]]:
    """Return for each layout that is known a map's name and the key of a socket."""
    here, there, port, peer = packed(of)
    wide = here + bytes(12) + there + bytes(12)
    return {
        "cilium": ("cilium_sock_op", wide + b"\1\0\0\0" + port + b"\0\0" + peer + b"\0\0"),
        "istio-bypass": ("map_redir", wide + b"\1" + bytes(7) + port + b"\0\0" + peer + b"\0\0"),
        "merbridge": ("sock_pair_map", wide + port + peer),
        "sock_tuple": ("accepted", here + there + port + peer),
        "redirect-sample": (
            "sock_ops_map", here + there + b"\1" + bytes(7) + port + b"\0\0" + peer + b"\0\0"
        ),
        "tutorial": ("sock_ops_map", here + there + b"\0\0" + port + b"\0\0" + peer + b"\2\0\0\0"),
        "addresses-ports": (
            "x",
            pack_address(of.getsockname()[0])
            + pack_address(of.getpeername()[0])
            + struct.pack("=II", of.getsockname()[1], of.getpeername()[1]),
        ),
        "cookie": ("y", of.getsockopt(socket.SOL_SOCKET, 57, 8)),
    }  # fmt: skip


def test_layouts_are_recognised(sandbox: Sandbox) -> None:
    with ExitStack() as stack, Visitor() as visitor:
        client, server = (stack.enter_context(each) for each in pair())
        for name, (called, key) in layouts(client).items():
            of = new_map(stack, called, len(key))
            insert(of, key, client)
            found = look(visitor, of)
            assert found.layout is not None
            assert (found.layout.name, found.live, found.stale) == (name, 1, {}), name
            insert(of, key, server)
            states = [each.state for each in look(visitor, of, found.layout).odd]
            assert states == [EntryState.OTHER], name


def test_closed_sockets_alone_tell_the_layout(sandbox: Sandbox) -> None:
    """A server's socket whose connection was reset has lost its local port."""
    with ExitStack() as stack, Visitor() as visitor:
        maps, ports = {}, set()
        for client, server in (pair() for _ in range(3)):
            stack.enter_context(server)
            ports.add(server.getsockname()[1])
            for name, (called, key) in layouts(server).items():
                if name not in maps:
                    maps[name] = new_map(stack, called, len(key))
                insert(maps[name], key, server)
            reset(client)
            wait_until(lambda of=server: is_closed(of), "the reset")  # type: ignore[misc]
        del maps["cookie"]
        for name, of in maps.items():
            found = look(visitor, of)
            assert {each.socket.local_port for each in found.stale.values()} == {0}
            assert found.layout is not None
            assert found.layout.name == name
            assert {each.ends.local_port for each in found.stale.values()} == ports, name


def test_a_layout_that_nobody_knows_is_inferred(sandbox: Sandbox) -> None:
    with ExitStack() as stack, Visitor() as visitor:
        of = new_map(stack, "strange", 24)
        for number in range(5):
            for end in pair():
                stack.enter_context(end)
                here, there, port, peer = packed(end)
                key = bytes([number]) * 6 + there + peer + here + port[::-1] + bytes(6)
                insert(of, key, end)
        found = audit(visitor, [of], wait=0)[0].result
        assert (found.keys, found.live) == ("inferred", 10)
        assert "dport:2be" in found.layout
        assert "sport:2le" in found.layout


def test_a_layout_that_cannot_be_known(sandbox: Sandbox) -> None:
    with ExitStack() as stack, Visitor() as visitor:
        of = new_map(stack, "strange", 5)
        client, server = (stack.enter_context(each) for each in pair())
        insert(of, b"hello", client)
        insert(of, b"world", server)
        reset(client)
        server.close()
        client, server = (stack.enter_context(each) for each in pair())
        insert(of, b"hello", client)
        found = audit(visitor, [of], wait=0)[0].result
        assert (found.keys, found.unknown, found.in_the_way) == ("unknown", 1, False)
        with pytest.raises(InputError, match="has 8 bytes, the keys of map .* have 5"):
            look(visitor, of, parse_key("sip:4 sport:2 dport:2"))


def test_every_entry_is_seen_once_and_quickly(sandbox: Sandbox) -> None:
    """The kernel's iterator repeats entries where one read(2) ends within a bucket."""
    with ExitStack() as stack, Visitor() as visitor:
        count = 65_536
        of = new_map(stack, "many", 12, entries=count)
        # Unlinking one of a socket's entries takes as long as it has entries.
        ends = [stack.enter_context(each) for _ in range(64) for each in pair()]
        for number in range(count):
            one = ends[number % len(ends)]
            here, _, port, peer = packed(one)
            insert(of, here + port + peer + struct.pack("=I", number), one)
        looks, seconds = [], []
        for _ in range(3):
            begin = time.thread_time()
            looks.append(look(visitor, of, parse_key("sip:4 sport:2 dport:2 any:4")))
            seconds.append(time.thread_time() - begin)
        found = looks[-1]
        print(f"{count:,} entries in {min(seconds) * 1000:.0f} ms")
        assert min(seconds) < 0.1
        assert (len(found.entries), found.live, found.odd) == (count, count, [])
        assert len({each.key for each in found.all()}) == count


def test_our_own_splicing_is_healthy() -> None:
    with Stage() as stage, ExitStack() as stack, Visitor() as visitor:
        ends = [stage.connected(place) for place in Place]
        for client, server in ends:
            client.sendall(b"ping")
            assert server.recv(9) == b"ping"
        of = open_sockmap(stack, stage.maps.sockets.info.id)
        found = audit(visitor, [of], wait=0.05)[0].result
        assert (found.keys, found.entries, found.live) == ("cookie", 10, 10)
        assert not found.in_the_way
        for each in (end for both in ends for end in both):
            each.close()


def test_the_command() -> None:
    with incident() as at:
        sandbox = at.stage.sandbox
        number = str(at.map.info.id)
        healthy = sandbox.sockhop("audit", "--id", number, "--wait", "50ms")
        assert "no stale entry is in anybody's way, no connection is harmed" in healthy.stdout
        at.stuck(Place.VETH4)
        found = sockhop(sandbox, "audit", "--id", number, "--wait", "50ms")
        assert found.returncode == 1
        assert "stale: closed" in found.stdout
        assert "tcp_bpf: tcp_bpf_recvmsg" in found.stdout
        assert "(tcp: tcp_recvmsg)" in found.stdout
        listed = ("audit", "--id", number, "--wait", "0", "--list", "-o", "json")
        told = json.loads(sockhop(sandbox, *listed).stdout)
        assert told["maps"][0]["stale_closed"] == 1
        assert len(told["entries"]) == told["maps"][0]["entries"] == 2
        assert any(each["harmful"] for each in told["pairs"]["half_spliced"])
        for wrong, said in (
            (("--id", "4000000000"), "map 4000000000: there is none"),
            (("--key", "sip:4 sport:2"), "--key is for one map"),
            (("--id", "1", "--all"), "exclude each other"),
            (("--dump", "/nonexistent"), "No such file"),
        ):
            failed = sockhop(sandbox, "audit", *wrong)
            assert failed.returncode == 2
            assert said in failed.stderr
