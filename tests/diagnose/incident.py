"""The incident: a sockhash by tuple, an entry that outlives its connection, and its victim."""

import contextlib
import os
import socket
import struct
from collections.abc import Iterator
from contextlib import ExitStack

from sockhop.datapath.vanilla import vanilla
from sockhop.diagnose.audit import Audit, audit
from sockhop.diagnose.pairs import PairCheck, examine
from sockhop.diagnose.visit import OpenMap, Visitor
from sockhop.kernel import netns
from sockhop.kernel._libbpf import ffi, lib
from sockhop.kernel.maps import map_info
from sockhop.kernel.namespaces import Namespaces
from tests.sandbox import wait_until
from tests.splice.stage import Place, Stage

__all__ = ["Incident", "incident", "insert", "is_closed", "new_map", "reset"]

PATIENCE = 0.3


def reset(of: socket.socket) -> None:
    """Close with an RST."""
    of.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    of.close()


class Incident:
    """A stage whose sockets go into a sockhash by tuple."""

    def __init__(self, stage: Stage, visitor: Visitor, of: OpenMap, stack: ExitStack) -> None:
        self.stage = stage
        self.visitor = visitor
        self.map = of
        self._stack = stack

    def audit(self, wait: float = 0.05) -> Audit:
        return audit(self.visitor, [self.map], wait=wait)[0]

    def examine(self) -> tuple[list[Audit], PairCheck]:
        """Audit the map, and look at the sockets of the stage's namespaces."""
        inodes = [netns.inode(path) for path in (self.stage.sandbox.netns, self.stage.other)]
        places = Namespaces().by_inode(inodes)
        return examine(self.visitor, [self.map], wait=0.05, places=places)

    def keep(self, *sockets: socket.socket) -> None:
        for each in sockets:
            self._stack.callback(each.close)

    def connect(
        self, place: Place, listener: socket.socket, port: int = 0
    ) -> tuple[socket.socket, socket.socket]:
        """Return both ends of a new connection from *port*: the client's, the server's."""
        client = self.stage.client(place, port)
        client.connect((place.target, listener.getsockname()[1]))
        server = listener.accept()[0]
        for each in (client, server):
            each.settimeout(PATIENCE)
        self.keep(client, server)
        return client, server

    def listen(self, place: Place) -> socket.socket:
        listener = self.stage.listen(place)
        self.keep(listener)
        return listener

    def leave_stale(self, place: Place, listener: socket.socket) -> tuple[socket.socket, int]:
        """Let a client reset its connection; return the server's socket, which stays open, and
        the client's port."""
        client, server = self.connect(place, listener)
        client.sendall(b"ping")
        assert server.recv(9) == b"ping"
        port = client.getsockname()[1]
        reset(client)
        wait_until(lambda: is_closed(server), "the reset")
        return server, port

    def stuck(
        self, place: Place
    ) -> tuple[socket.socket, socket.socket, socket.socket, socket.socket]:
        """Return a listener, the socket of the stale entry, and both ends of its victim."""
        listener = self.listen(place)
        old, port = self.leave_stale(place, listener)
        client, server = self.connect(place, listener, port)
        client.sendall(b"request")
        with contextlib.suppress(TimeoutError):
            raise AssertionError(server.recv(9))
        return listener, old, client, server


def is_closed(of: socket.socket) -> bool:
    """Whether the connection is over."""
    return of.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1) == b"\x07"


@contextlib.contextmanager
def incident() -> Iterator[Incident]:
    """Run the body with sockets in a sockhash by tuple."""
    with (
        Stage(spliced=False) as stage,
        vanilla(stage.sandbox.cgroup) as fd,
        ExitStack() as stack,
        Visitor() as visitor,
    ):
        yield Incident(stage, visitor, OpenMap(fd, map_info(fd)), stack)


def new_map(stack: ExitStack, name: str, key_size: int, *, entries: int = 64) -> OpenMap:
    """Return a new sockhash."""
    options = ffi.new("char[]", name.encode())
    fd = lib.bpf_map_create(lib.BPF_MAP_TYPE_SOCKHASH, options, key_size, 4, entries, ffi.NULL)
    assert fd >= 0, fd
    stack.callback(os.close, fd)
    return OpenMap(fd, map_info(fd))


def insert(into: OpenMap, key: bytes, of: socket.socket) -> None:
    """Put a socket into a map by hand."""
    value = ffi.new("__u32 *", of.fileno())
    assert lib.bpf_map_update_elem(into.fd, key, value, 0) == 0
