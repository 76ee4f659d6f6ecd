"""Which backends a socket that is to be moved may go to, and which of them fit it.

A socket that has a source address keeps it when it connects again (__ip4_datagram_connect()), so
one at 127.0.0.1 cannot leave the node (EINVAL), and one at eth0's address would send from there
through eth1. A backend fits where a new socket would get the address that the old one has, and
where what is sent does not leave the network namespace: then every address of it will do.
"""

import itertools
import os
import socket
from typing import NamedTuple

from sockhop.datapath.balancer import BalanceMaps
from sockhop.datapath.records import STATES, FrontendRecord, SlotKey, word_generation
from sockhop.kernel.netns import entered, netns_of
from sockhop.kernel.routes import Route, Routes
from sockhop.model import BackendState

__all__ = ["Candidate", "Fitting", "Traits", "active_backends"]

_ATTEMPTS = 4
_SO_BINDTOIFINDEX = 62
_UNICAST_IF = {
    socket.AF_INET: (socket.IPPROTO_IP, 50),
    socket.AF_INET6: (socket.IPPROTO_IPV6, 76),
}


class Candidate(NamedTuple):
    """A backend, by its id; `backend` 0 for an address that is none."""

    backend: int
    address: bytes
    port: int
    weight: int = 1


def active_backends(maps: BalanceMaps, frontend: FrontendRecord) -> list[Candidate]:
    """Return the active backends that the hook would choose from."""
    found: list[Candidate] = []
    for _ in range(_ATTEMPTS):
        word = maps.words.get(frontend.id) or 0
        found = []
        for position in itertools.count():
            key = SlotKey(frontend.id, word_generation(word), position)
            slot = maps.slots.get(key)
            if slot is None or slot.key != maps.slot_key.encode(key):
                break
            if STATES[slot.state] is BackendState.ACTIVE and slot.weight:
                found.append(Candidate(slot.backend, slot.address, slot.port, slot.weight))
        if maps.words.get(frontend.id) == word:
            break
    return found


class Traits(NamedTuple):
    """What of a socket decides on its source address: `netns` is an inode.

    `local` is the address that it has, `bound` whether the program has bound it to that.
    """

    netns: int
    local: bytes
    bound: bool
    device: int
    mark: int
    uid: int

    @classmethod
    def of(cls, own: socket.socket, *, netns: int, local: bytes, bound: bool) -> "Traits":
        """Read the rest from a descriptor of the socket."""
        level, option = _UNICAST_IF[socket.AddressFamily(own.family)]
        device = own.getsockopt(socket.SOL_SOCKET, _SO_BINDTOIFINDEX)
        return cls(
            netns,
            local,
            bound,
            device or socket.ntohl(own.getsockopt(level, option)),
            own.getsockopt(socket.SOL_SOCKET, socket.SO_MARK),
            os.fstat(own.fileno()).st_uid,
        )


class Fitting:
    """Asks for routes, in each network namespace and for each question once.

    For a batch: it does not notice that routes change. Use as a context manager.
    """

    def __init__(self) -> None:
        self._routes: dict[int, Routes] = {}
        self._found: dict[tuple[Traits, bytes], Route | None] = {}

    def close(self) -> None:
        """Forget everything."""
        for routes in self._routes.values():
            routes.close()
        self._routes.clear()

    def __enter__(self) -> "Fitting":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def source(self, own: socket.socket, traits: Traits, to: bytes) -> bytes | None:
        """Return the source address with which *own* can be there; None without a route.

        Within a network namespace that is any: the answers find it, too.
        """
        question = traits, to
        if question not in self._found:
            self._found[question] = self._routes_of(own, traits.netns).find(
                to,
                bound=traits.local if traits.bound else b"",
                device=traits.device,
                mark=traits.mark,
                uid=traits.uid,
            )
        route = self._found[question]
        if route and route.local and _is_mapped(to) == _is_mapped(traits.local):
            return traits.local
        return route and route.source

    def _routes_of(self, own: socket.socket, netns: int) -> Routes:
        if netns not in self._routes:
            with netns_of(own) as path, entered(path):
                self._routes[netns] = Routes()
        return self._routes[netns]


def _is_mapped(address: bytes) -> bool:
    return address[:12] == bytes(10) + b"\xff\xff"
