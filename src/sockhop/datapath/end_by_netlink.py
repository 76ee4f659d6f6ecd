"""Ends sockets with SOCK_DESTROY (sock_diag(7)), which every kernel with sock_diag may have."""

import errno
import os
import socket
from collections.abc import Iterable, Mapping, Sequence, Set
from contextlib import suppress
from pathlib import Path

from sockhop.datapath.listing import PROTOCOLS, list_here
from sockhop.datapath.memory import SocketMemory
from sockhop.datapath.outcome import Action, Outcome
from sockhop.datapath.records import BackendRecord
from sockhop.datapath.sockets import CONNECTED, Pair, Socket, Sockets
from sockhop.kernel.namespaces import Namespace, NamespaceGone, entered
from sockhop.kernel.sockdiag import destroy_sockets
from sockhop.kernel.sockfilter import any_peer

__all__ = ["NetlinkMethod"]


class NetlinkMethod:
    """Finds the sockets by their provenance and names each to the kernel, by ends and cookie.

    The kernel compares both again. Of UDP it does not compare the peer: a socket with a port of its
    own that loses its peer in the microseconds between is ended all the same.
    """

    name = "netlink"
    protocols = frozenset({*PROTOCOLS, socket.IPPROTO_RAW})

    def __init__(self, pins: Path) -> None:
        self._pins = pins
        self._sockets: Sockets | None = None

    def close(self) -> None:
        """Unload what has been loaded."""
        if self._sockets is not None:
            self._sockets.close()
            self._sockets = None

    def prepare(self) -> None:
        """Load what end_pairs() needs, so that the first socket to end need not wait for that."""
        if self._sockets is None:
            self._sockets = Sockets(self._pins)

    def end_pairs(
        self, pairs: Set[Pair], known: Mapping[int, BackendRecord], places: Iterable[Namespace]
    ) -> list[Outcome]:
        """End the sockets that are with one of *pairs*, in *places*: one pass.

        *known*: their backends by id, those that are still in the maps.
        """
        self.prepare()
        assert self._sockets
        meant = self._sockets.of_pairs(pairs)
        with SocketMemory(self._pins) as memory:
            by_cookie = memory.provenances_by_cookie()
        peers = {(record.address, record.port) for record in known.values()}
        # Unless all are known the kernel must not leave others out.
        where = any_peer(peers) if all(pair.backend in known for pair in pairs) else b""
        outcomes: list[Outcome] = []
        for place in places:
            here = [each for each in meant if each.netns == place.inode]
            with suppress(NamespaceGone), entered(place):
                if by_cookie:
                    found = list_here(PROTOCOLS, states=CONNECTED, where=where)
                    others = (s._replace(origin=by_cookie.get(s.cookie)) for s in found)
                    here += (each for each in others if each.pair in pairs)
                outcomes += _destroy([each for each in here if not each.reason_to_leave])
        return outcomes

    def end_sockets(self, sockets: Sequence[Socket], place: Namespace) -> list[Outcome]:
        """End these sockets of a namespace; one outcome for each. NamespaceGone where it is."""
        with entered(place):
            return _destroy(sockets)


def _destroy(sockets: Sequence[Socket]) -> list[Outcome]:
    results = destroy_sockets(sockets)
    return [_outcome(each, number) for each, number in zip(sockets, results, strict=True)]


def _outcome(each: Socket, number: int) -> Outcome:
    if number == 0:
        return Outcome(each, Action.SEVERED)
    if number in (errno.ENOENT, errno.ESTALE):
        return Outcome(each, Action.GONE)
    return Outcome(each, Action.REFUSED, f"SOCK_DESTROY: {os.strerror(number)}")
