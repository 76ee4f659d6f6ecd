"""Live counts: never below the truth, whatever sockets do, and equal to it once looked at."""

import ctypes
import errno
import random
import socket
import struct
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from sockhop.datapath.balancer import map_directory
from sockhop.datapath.live_index import LiveIndex
from sockhop.datapath.records import LiveKey
from sockhop.datapath.sockets import Sockets
from sockhop.kernel.btf import Layouts
from sockhop.kernel.maps import U32, Map, open_pinned
from sockhop.kernel.objects import object_path
from tests.clients.dialers import family_of
from tests.datapath.node import Node, service
from tests.sandbox import ServerThread

pytestmark = pytest.mark.kernel

STEPS = 400
# Nobody listens there, and there is no route to the other.
REFUSING, UNREACHABLE = "127.0.2.1:9", "10.222.0.1:9"
_LIBC = ctypes.CDLL(None)  # Python has no connect(AF_UNSPEC)
FRONTENDS = ("10.9.3.1", "10.9.3.2", "10.9.3.3", "::ffff:10.9.3.1", "10.9.3.4", "10.9.3.5")


class Crowd:
    """Sockets that connect, connect again, disconnect and close, and where each of them is."""

    def __init__(self, node: Node, chance: random.Random) -> None:
        self.node = node
        self.chance = chance
        self.where: dict[socket.socket, tuple[str, int] | None] = {}

    def open(self) -> None:
        kind = self.chance.choice([socket.SOCK_STREAM, socket.SOCK_DGRAM])
        host = self.chance.choice(FRONTENDS)
        self.where[socket.socket(family_of(host), kind)] = None

    def connect(self) -> None:
        client = self.chance.choice(list(self.where))
        host = self.chance.choice([h for h in FRONTENDS if family_of(h) == client.family])
        if client.type == socket.SOCK_STREAM and self.where[client]:
            return  # EISCONN comes before the hook
        try:
            client.connect((host, 80))
        except OSError as error:
            assert error.errno in (errno.ECONNREFUSED, errno.ENETUNREACH)
            return
        self.where[client] = self.node.chosen(client.fileno())

    def dissolve(self) -> None:
        client = self.chance.choice(list(self.where))
        if client.type == socket.SOCK_DGRAM:
            nobody = struct.pack("=H14x", socket.AF_UNSPEC)
            assert _LIBC.connect(client.fileno(), nobody, len(nobody)) == 0
            self.where[client] = None

    def close(self) -> None:
        client = self.chance.choice(list(self.where))
        del self.where[client]
        client.close()

    def step(self) -> None:
        actions = {self.open: 3, self.connect: 8, self.dissolve: 1, self.close: 2}
        action = self.chance.choices(list(actions), list(actions.values()))[0]
        if self.where or action == self.open:
            action()

    @property
    def truth(self) -> Counter[tuple[str, int]]:
        return Counter(there for there in self.where.values() if there)

    def end(self) -> None:
        for client in self.where:
            client.close()
        self.where.clear()


def too_low(node: Node, seed: int) -> list[str]:
    """Return what was below the truth at any time, or is not the truth in the end."""
    crowd, wrong = Crowd(node, random.Random(seed)), []
    try:
        for number in range(STEPS):
            crowd.step()
            live = node.live()
            wrong += [
                f"step {number}: {there} has {n}, counted {live[there]}"
                for there, n in crowd.truth.items()
                if live[there] < n
            ]
        time.sleep(1.1)  # a connect() of a second ago is through
        node.settle()
        if node.live() != crowd.truth:
            wrong.append(f"in the end {crowd.truth}, counted {node.live()}")
    finally:
        crowd.end()
    if +node.live():
        wrong.append(f"after all is closed: {node.live()}")
    return wrong


@pytest.fixture
def served(node: Node) -> Node:
    backends = ("127.0.1.1:7000", "127.0.1.2:7000")
    other = [*backends, REFUSING, UNREACHABLE]
    node.install(
        service("a", "10.9.3.1:80/tcp", "10.9.3.1:80/udp", backends=backends),
        service("b", "10.9.3.2:80/tcp", "10.9.3.2:80/udp", backends=backends[:1]),
        service("c", "10.9.3.3:80/tcp", "10.9.3.3:80/udp", backends=other),
        service("d", "10.9.3.4:80/tcp", "10.9.3.4:80/udp", backends=[REFUSING]),
        service("e", "10.9.3.5:80/tcp", "10.9.3.5:80/udp", backends=[UNREACHABLE]),
    )
    return node


def test_counts_are_never_below_the_truth(served: Node, tmp_path: Path) -> None:
    seed = random.SystemRandom().randrange(1 << 32)
    with ServerThread("one", "127.0.1.1", 7000), ServerThread("two", "127.0.1.2", 7000):
        assert not too_low(served, seed), seed
        forgetful = ("bool stays = old->protocol != IPPROTO_TCP &&", "bool stays = 0 &&")
        with served.mutated(tmp_path, forgetful):
            assert too_low(served, seed), seed


# --- counts that nobody needs any more ----------------------------------------------------------


def crowd(node: Node) -> None:
    """Leave in the index what namespaces that are gone have left, more than half of its room."""
    live, (some, *_) = node.maps.live, node.maps.backends.keys()
    live.update_many((LiveKey(1 << 60 | n, 1, some), 0) for n in range(live.max_entries // 2 + 1))


@pytest.fixture
def index(served: Node) -> Iterator[LiveIndex]:
    with Sockets(served.sandbox.pins) as sockets:
        yield LiveIndex(served.maps, sockets)
    served.maps.live.delete_many(served.maps.live.keys())


def test_namespaces_that_went_do_not_fill_the_map(served: Node, index: LiveIndex) -> None:
    live, backends = served.maps.live, set(served.maps.backends.keys())
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.connect(("10.9.3.2", 80))
        crowd(served)
        index.settle(backends)
        assert live.used() > live.max_entries // 2  # one look tells nothing
        index.settle(backends)
        assert [count for _, count in live.items()] == [1]
    for _ in range(3):
        index.settle(backends)
    assert [count for _, count in live.items()] == [0]  # there is room: it may be of use
    assert served.maps.index_is_whole()


def loses_one(node: Node, index: LiveIndex, client: socket.socket) -> None:
    """Have a hook add to an entry that was deleted after it had found it."""
    client.connect(("10.9.3.2", 80))
    for key in [key for key, count in node.maps.live.items() if count]:
        node.maps.live.set(key, 0)
    crowd(node)
    for _ in range(2):
        index.settle(set(node.maps.backends.keys()))


def test_a_count_that_is_lost_is_noticed(served: Node, index: LiveIndex) -> None:
    assert served.maps.index_is_whole()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        loses_one(served, index, client)
        assert not served.maps.index_is_whole()
        index.settle(set())
        assert not served.maps.index_is_whole()
    index.settle(set())
    assert served.maps.index_is_whole()


def test_a_look_that_sees_nothing_is_noticed(
    served: Node, index: LiveIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index, "_is_whole", lambda: True)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        loses_one(served, index, client)
        assert served.maps.index_is_whole()


def test_an_index_that_was_full_is_whole_again(served: Node, index: LiveIndex) -> None:
    live, backends = served.maps.live, set(served.maps.backends.keys())
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        crowd(served)
        room = range(live.max_entries - live.used())
        live.update_many((LiveKey(2 << 60 | n, 1, min(backends)), 0) for n in room)
        client.connect(("10.9.3.2", 80))
        assert not served.maps.index_is_whole()
        for _ in range(2):
            index.settle(backends)
        assert not served.maps.index_is_whole()  # there is room now, but the socket is not counted
    index.settle(backends)
    assert served.maps.index_is_whole()


# --- the build for kernels without atomic instructions that fetch (before 5.12) -----------------

PLAIN_BUILD = ("#ifndef PLAIN", "#if 0")
NOBODY_IS_FIRST = ("&takings, &key, &one, BPF_NOEXIST)", "&takings, &key, &one, BPF_ANY)")


class Taking(NamedTuple):
    """struct taking."""

    since: int
    backend: int
    counted: int


@pytest.fixture
def plain(served: Node, monkeypatch: pytest.MonkeyPatch) -> Iterator[Node]:
    monkeypatch.setattr("sockhop.datapath.sockets.object_path", lambda _: object_path(SOCKETS))
    with served.running(object_path("balance.plain")):
        yield served


SOCKETS = "sockets.plain"


def test_the_plain_build_counts_as_well(plain: Node) -> None:
    seed = random.SystemRandom().randrange(1 << 32)
    with ServerThread("one", "127.0.1.1", 7000), ServerThread("two", "127.0.1.2", 7000):
        assert not too_low(plain, seed), seed


def second(node: Node, *, settles: bool) -> int:
    """Return the live count after a socket was uncounted by somebody who came second."""
    layouts = Layouts(object_path("balance.plain"))
    pin = map_directory(node.sandbox.pins) / "takings"
    with (
        Map(open_pinned(pin), layouts.codec(Taking, "taking"), U32) as takings,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client,
    ):
        client.connect(("10.9.3.2", 80))
        origin = node.provenance(client.fileno())
        assert origin is not None
        takings.set(Taking(origin.since, origin.backend, origin.counted), 1)
        if settles:
            nobody = struct.pack("=H14x", socket.AF_UNSPEC)
            assert _LIBC.connect(client.fileno(), nobody, len(nobody)) == 0
            time.sleep(1.1)
            node.settle()
        else:
            client.close()
        left = sum(node.live().values())
        for key in node.maps.live.keys():
            node.maps.live.delete(key)
        return left


def test_who_comes_second_subtracts_nothing(plain: Node, tmp_path: Path) -> None:
    assert second(plain, settles=False) == 1
    assert second(plain, settles=True) == 1
    with plain.mutated(tmp_path, PLAIN_BUILD, NOBODY_IS_FIRST):
        assert second(plain, settles=False) == 0
