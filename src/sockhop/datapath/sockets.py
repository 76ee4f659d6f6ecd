"""Balanced sockets of the whole node, whatever network namespace they are in."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from sockhop.datapath.balancer import NotInstalled, map_directory
from sockhop.datapath.records import Provenance, SocketRecord
from sockhop.kernel._libbpf import lib
from sockhop.kernel.objects import BpfObject, object_path
from sockhop.kernel.syscall import check

__all__ = ["TCP_STATES", "BalancedSocket", "balanced_sockets"]

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
    def state(self) -> str:
        """The socket's state as ss names it."""
        return TCP_STATES[self.socket.state - 1]


def balanced_sockets(pins: Path) -> list[BalancedSocket]:
    """Return all sockets that are balanced now; NotInstalled where nothing is.

    Needs Linux 5.10 (iter/bpf_sk_storage_map). A socket that is closed meanwhile may be missed.
    """
    if not (map_directory(pins) / "provenance").exists():
        raise NotInstalled(f"{pins}: nothing is installed here", hint="is an agent running?")
    with BpfObject(object_path("sockets"), pins=map_directory(pins)) as loaded:
        records = loaded.layouts.codec(SocketRecord, "socket_record")
        provenances = loaded.layouts.codec(Provenance, "provenance")
        data = b"".join(_read(loaded.program("sockhop_sockets"), loaded.map_fd("provenance")))
    found = [(provenances.decode(r.provenance), r) for r in records.decode_many(data)]
    return [BalancedSocket(*pair) for pair in found if pair[0].backend]


def _read(program: int, over: int) -> Iterator[bytes]:
    link = check(lib.sockhop_iter_link(program, over), "linking the socket iterator")
    try:
        iterator = check(lib.bpf_iter_create(link), "starting the socket iterator")
    finally:
        os.close(link)
    with os.fdopen(iterator, "rb", buffering=0) as stream:
        while chunk := stream.read(1 << 16):
            yield chunk
