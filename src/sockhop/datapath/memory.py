"""What the hooks remember of one socket. Works without their programs."""

import socket
import struct
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

from sockhop.datapath.balancer import map_directory
from sockhop.datapath.records import (
    DatagramPeer,
    DatagramPeers,
    OverflowKey,
    OverflowPeer,
    Provenance,
)
from sockhop.kernel.btf import Codec, Layouts
from sockhop.kernel.maps import U64, Map, open_pinned
from sockhop.kernel.objects import object_path

__all__ = ["Peer", "SocketMemory"]

_FD: Codec[int] = Codec(int, struct.Struct("=i"))


class Peer(NamedTuple):
    """The backend that an unconnected UDP socket uses for a frontend.

    `used` grows with every datagram of the socket; 0 where its storage was refused.
    """

    frontend_address: bytes
    frontend_port: int
    backend_address: bytes
    backend_port: int
    backend: int
    used: int


class SocketMemory:
    """The pinned maps with sockets as keys.

    A process finds what a sk_storage map holds of a socket by a descriptor of its own
    (net/core/bpf_sk_storage.c).
    """

    def __init__(self, pins: Path) -> None:
        """Open the maps below *pins*; FileNotFoundError where they are not there."""
        layouts = Layouts(object_path("balance"))
        self._pins = pins
        self._stack = ExitStack()
        self._peer = layouts.codec(DatagramPeer, "datagram_peer")
        provenance = layouts.codec(Provenance, "provenance")
        try:
            self._provenance: Map[int, Provenance] = self._open("provenance", _FD, provenance)
            self._by_cookie: Map[int, Provenance] = self._open(
                "provenance_by_cookie", U64, provenance
            )
            peers = layouts.codec(DatagramPeers, "datagram_peers")
            self._datagrams = self._open("datagrams", _FD, peers)
            self._overflow = self._open(
                "datagram_overflow",
                layouts.codec(OverflowKey, "overflow_key"),
                layouts.codec(OverflowPeer, "overflow_peer"),
            )
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the descriptors."""
        self._stack.close()

    def __enter__(self) -> "SocketMemory":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def provenance(self, own: socket.socket) -> Provenance | None:
        """Return what connect() left at a socket that this process has a descriptor of."""
        return self._provenance.get(own.fileno())

    def provenance_by_cookie(self, cookie: int) -> Provenance | None:
        """Return what was kept by the cookie, where the socket's own storage was refused."""
        return self._by_cookie.get(cookie)

    def provenances_by_cookie(self) -> dict[int, Provenance]:
        """Return all that is kept by cookie, also of sockets that are gone."""
        return dict(self._by_cookie.items())

    def peers(self, own: socket.socket, cookie: int) -> list[Peer]:
        """Return what datagrams left at a socket that this process has a descriptor of."""
        kept = self._datagrams.get(own.fileno())
        if kept is None:
            return []
        found = [
            Peer(
                peer.frontend_address,
                peer.frontend_port,
                peer.backend_address,
                peer.backend_port,
                peer.backend,
                peer.used,
            )
            for peer in self._peer.decode_many(kept.peer)
            if peer.backend_port
        ]
        return found + (self._overflown(cookie) if kept.overflown else [])

    def _overflown(self, cookie: int) -> list[Peer]:
        """The entry of the backend knows better who sent last, but names one frontend only."""
        kept = {key: to for key, to in self._overflow.items() if key.cookie == cookie}
        last = {(to.address, to.port): to.used for key, to in kept.items() if key.direction}
        return [
            Peer(
                *(frontend := (key.address, key.port)),
                to.address,
                to.port,
                to.backend,
                max(to.used, last.get(frontend, 0)),
            )
            for key, to in kept.items()
            if not key.direction
        ]

    def _open(self, name: str, key: Codec[Any], value: Codec[Any]) -> Map[Any, Any]:
        fd = open_pinned(map_directory(self._pins) / name)
        return self._stack.enter_context(Map(fd, key, value))
