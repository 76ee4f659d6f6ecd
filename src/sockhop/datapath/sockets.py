"""Sockets as sockhop sees them, and the balanced ones of the whole node."""

import os
import socket
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from sockhop.datapath.balancer import NotInstalled, check_version, map_directory
from sockhop.datapath.pins import is_pinned
from sockhop.datapath.records import Provenance, SocketRecord
from sockhop.kernel._libbpf import lib
from sockhop.kernel.maps import U32, Map
from sockhop.kernel.objects import BpfObject, object_path
from sockhop.kernel.syscall import KernelError, check

__all__ = ["CONNECTED", "TCP_STATES", "Pair", "Socket", "SocketRecords", "Sockets", "read_iterator"]

# include/net/tcp_states.h, from 1 on, as ss names them; UDP uses the first and the seventh.
TCP_STATES = (
    *("ESTAB", "SYN-SENT", "SYN-RECV", "FIN-WAIT-1", "FIN-WAIT-2", "TIME-WAIT", "UNCONN"),
    *("CLOSE-WAIT", "LAST-ACK", "LISTEN", "CLOSING", "NEW-SYN-RECV"),
)


class Pair(NamedTuple):
    """A backend of a service, by their ids, which are never given twice."""

    service: int
    backend: int


class Socket(NamedTuple):
    """A TCP, UDP or raw socket. Addresses are 16 bytes, IPv4 mapped.

    `state` is a number of include/net/tcp_states.h; `interface` the one that it is bound to, or 0;
    `inode` is 0 where no process holds it (:func:`sockhop.kernel.procfs.find_holders` finds who
    does); `cgroup` the id of the one in which it was made; `netns` the inode of its network
    namespace. TCP: bytes that the program has not read and that the peer has not acknowledged,
    bytes acknowledged and received, segments received, pure acknowledgements among them; whoever
    wants to know whether a connection moves compares the last three with those of before.
    `origin` is what the kernel remembers of a balanced socket, None of one that is unmanaged.
    """

    local_address: bytes
    remote_address: bytes
    cookie: int
    inode: int
    cgroup: int
    acknowledged: int
    received: int
    interface: int
    unread: int
    waiting: int
    segments: int
    local_port: int
    remote_port: int
    family: int
    protocol: int
    state: int
    netns: int
    origin: Provenance | None

    @property
    def current(self) -> bool:
        """Whether it is still with the backend that it was given last."""
        return self.origin is not None and self.pair == (self.origin.service, self.origin.backend)

    @property
    def pair(self) -> Pair | None:
        """The backend that it is with now, of the two that it was given last; None for neither."""
        origin, peer = self.origin, (self.remote_address, self.remote_port)
        if origin is None or self.state == _UNCONN:
            return None
        if peer == (origin.backend_address, origin.backend_port):
            return Pair(origin.service, origin.backend)
        if peer == (origin.previous_address, origin.previous_port):
            return Pair(origin.previous_service, origin.previous_backend)
        return None

    @property
    def is_open(self) -> bool:
        """Whether it has not been closed. TCP then says goodbye, UDP waits for a grace period."""
        return bool(self.inode)

    @property
    def reason_to_leave(self) -> str:
        """Why a socket of this kind is never ended from outside; "" where it may be."""
        name = self.state_name
        if self.protocol == socket.IPPROTO_TCP and name not in _ENDABLE_TCP:
            return f"TCP in {name}"
        if self.protocol == socket.IPPROTO_UDP and name != "ESTAB":
            return "UDP that is not connected"
        return "" if self.is_open else "no process holds it"

    @property
    def state_name(self) -> str:
        """The socket's state as ss names it."""
        return TCP_STATES[self.state - 1]


_UNCONN = TCP_STATES.index("UNCONN") + 1
# Not SYN-RECV either: SOCK_DIAG shows NEW-SYN-RECV under this name, and FIN-WAIT-2 may be a
# TIME-WAIT, but then no process holds it (net/ipv4/inet_diag.c).
_ENDABLE_TCP = frozenset(
    {"ESTAB", "SYN-SENT", "FIN-WAIT-1", "FIN-WAIT-2", "CLOSE-WAIT", "LAST-ACK", "CLOSING"}
)
CONNECTED = sum(1 << TCP_STATES.index(name) + 1 for name in _ENDABLE_TCP)
"""The states of sockets that may be ended, one bit each."""


class Sockets:
    """The loaded programs that visit every socket with a provenance. Needs Linux 5.10."""

    def __init__(self, pins: Path) -> None:
        """Load them over the maps pinned below *pins*; NotInstalled where there are none."""
        if not is_pinned(pins, "provenance"):
            raise NotInstalled(f"{pins}: nothing is installed here", hint="is an agent running?")
        check_version(pins)
        self._object = BpfObject(object_path("sockets"), pins=map_directory(pins))
        self._records = SocketRecords(self._object)
        pairs = os.dup(self._object.map_fd("pairs"))
        self._pairs = Map(pairs, self._object.layouts.codec(Pair, "pair"), U32)

    def close(self) -> None:
        """Unload the programs."""
        self._pairs.close()
        self._object.close()

    def __enter__(self) -> "Sockets":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def balanced(self) -> list[Socket]:
        """Return the sockets of all namespaces that are with the backend that they were given.

        A socket that is opened or closed meanwhile may be missed.
        """
        return [found for found in self.remembered() if found.current]

    def remembered(self) -> list[Socket]:
        """Return all sockets that have a provenance, as :meth:`balanced` does."""
        return self._records.decode(self._visit("sockhop_sockets"))

    def of_pairs(self, pairs: Collection[Pair]) -> list[Socket]:
        """Return the sockets that are with one of these backends, as :meth:`balanced` does."""
        with held(self._pairs, pairs):
            return self._records.decode(self._visit("sockhop_of_pairs"))

    def settle(self) -> None:
        """Uncount the sockets that have left their backend where no hook saw it."""
        self._visit("sockhop_settle")

    def _visit(self, program: str) -> bytes:
        over = self._object.map_fd("provenance")
        link = check(
            lib.sockhop_iter_link(self._object.program(program), over), f"linking {program}"
        )
        try:
            return read_iterator(link, program)
        finally:
            os.close(link)


class SocketRecords:
    """Decodes what the iterators of an object write."""

    def __init__(self, programs: BpfObject) -> None:
        self._records = programs.layouts.codec(SocketRecord, "socket_record")
        self._provenances = programs.layouts.codec(Provenance, "provenance")

    def decode(self, data: bytes) -> list[Socket]:
        """Return the sockets of consecutive struct socket_record."""
        return [found for found, _ in self.results(data)]

    def results(self, data: bytes) -> list[tuple[Socket, int]]:
        """Return the sockets with what became of each: 0 or -errno."""
        return [
            (Socket._make((*record[1:-1], self._origin(record.provenance))), record.result)
            for record in self._records.decode_many(data)
        ]

    def _origin(self, data: bytes) -> Provenance | None:
        origin = self._provenances.decode(data)
        return origin if origin.since else None


@contextmanager
def held(pairs: Map[Pair, int], wanted: Collection[Pair]) -> Iterator[None]:
    """Have *wanted* in the map of an iterator's object while the body runs."""
    try:
        pairs.update_many((Pair(*pair), 1) for pair in wanted)
        yield
    finally:
        pairs.delete_many(Pair(*pair) for pair in wanted)


def read_iterator(link: int, program: str) -> bytes:
    """Run the program of an iterator link in this thread's namespace; return what it writes."""
    iterator = check(lib.bpf_iter_create(link), f"starting {program}")
    chunks: list[bytes] = []
    try:
        while not chunks or chunks[-1]:
            # After a million objects of which nothing was written (kernel/bpf/bpf_iter.c).
            with suppress(BlockingIOError):
                chunks.append(os.read(iterator, 1 << 16))
    except OSError as error:
        raise KernelError(f"running {program}", error.errno or 0) from None
    finally:
        os.close(iterator)
    return b"".join(chunks)
