"""Balanced sockets of the whole node, whatever network namespace they are in."""

import os
from pathlib import Path
from typing import NamedTuple

from sockhop.datapath.balancer import NotInstalled, map_directory
from sockhop.datapath.records import Provenance, SocketRecord
from sockhop.kernel._libbpf import lib
from sockhop.kernel.objects import BpfObject, object_path
from sockhop.kernel.syscall import check

__all__ = ["TCP_STATES", "BalancedSocket", "Sockets"]

# include/net/tcp_states.h, from 1 on, as ss names them; UDP uses the first and the seventh.
TCP_STATES = (
    *("ESTAB", "SYN-SENT", "SYN-RECV", "FIN-WAIT-1", "FIN-WAIT-2", "TIME-WAIT", "UNCONN"),
    *("CLOSE-WAIT", "LAST-ACK", "LISTEN", "CLOSING", "NEW-SYN-RECV"),
)


class BalancedSocket(NamedTuple):
    """A socket with a provenance: what the kernel remembers, and what the socket is now."""

    provenance: Provenance
    socket: SocketRecord

    @property
    def current(self) -> bool:
        """Whether the socket is still with the backend that it was given."""
        origin, socket = self.provenance, self.socket
        there = (origin.backend_address, origin.backend_port)
        return (socket.remote_address, socket.remote_port) == there and self.state != "UNCONN"

    @property
    def is_open(self) -> bool:
        """Whether it has not been closed. TCP then says goodbye, UDP waits for a grace period."""
        return bool(self.socket.inode)

    @property
    def state(self) -> str:
        """The socket's state as ss names it."""
        return TCP_STATES[self.socket.state - 1]


class Sockets:
    """The loaded programs that visit every socket with a provenance. Needs Linux 5.10."""

    def __init__(self, pins: Path) -> None:
        """Load them over the maps pinned below *pins*; NotInstalled where there are none."""
        if not (map_directory(pins) / "provenance").exists():
            raise NotInstalled(f"{pins}: nothing is installed here", hint="is an agent running?")
        self._object = BpfObject(object_path("sockets"), pins=map_directory(pins))
        self._records = self._object.layouts.codec(SocketRecord, "socket_record")
        self._provenances = self._object.layouts.codec(Provenance, "provenance")

    def close(self) -> None:
        """Unload the programs."""
        self._object.close()

    def __enter__(self) -> "Sockets":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def balanced(self) -> list[BalancedSocket]:
        """Return the sockets of all namespaces that are with the backend that they were given.

        A socket that is opened or closed meanwhile may be missed.
        """
        return [socket for socket in self.remembered() if socket.current]

    def remembered(self) -> list[BalancedSocket]:
        """Return all sockets that have a provenance, as :meth:`balanced` does."""
        records = self._records.decode_many(self._visit("sockhop_sockets"))
        return [BalancedSocket(self._provenances.decode(r.provenance), r) for r in records]

    def settle(self) -> None:
        """Uncount the sockets that have left their backend where no hook saw it."""
        self._visit("sockhop_settle")

    def _visit(self, program: str) -> bytes:
        over = self._object.map_fd("provenance")
        link = check(
            lib.sockhop_iter_link(self._object.program(program), over), f"linking {program}"
        )
        try:
            iterator = check(lib.bpf_iter_create(link), f"starting {program}")
        finally:
            os.close(link)
        with os.fdopen(iterator, "rb", buffering=0) as stream:
            return b"".join(iter(lambda: stream.read(1 << 16), b""))
