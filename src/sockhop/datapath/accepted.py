"""Which TCP sockets came out of accept(): their peers have dialled, not they."""

import os
import socket
import struct
from collections import defaultdict
from collections.abc import Iterable

from sockhop.datapath.sockets import TCP_STATES, Socket, read_iterator
from sockhop.errors import SystemLackError
from sockhop.kernel._libbpf import lib
from sockhop.kernel.objects import BpfObject, object_path
from sockhop.kernel.syscall import check
from sockhop.model import pack_address

__all__ = ["LISTENING", "Accepted", "covered"]

LISTENING = 1 << TCP_STATES.index("LISTEN") + 1
"""The state of TCP sockets that listen, as a bit."""

_ANY = {pack_address("0.0.0.0"), pack_address("::")}


class Accepted:
    """The loaded program that visits the TCP sockets of a namespace. Use as a context manager.

    Where the kernel does not take it (before Linux 5.9) it names none.
    """

    def __init__(self) -> None:
        self._object: BpfObject | None = None
        self._link = -1
        try:
            self._object = BpfObject(object_path("accepted"))
            program = self._object.program("sockhop_accepted")
            self._link = check(lib.sockhop_iter_link(program, -1), "linking sockhop_accepted")
        except SystemLackError:
            self.close()

    def close(self) -> None:
        """Unload the program."""
        if self._link >= 0:
            os.close(self._link)
            self._link = -1
        if self._object:
            self._object.close()
            self._object = None

    def __enter__(self) -> "Accepted":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def here(self) -> set[int]:
        """Return the cookies of those in this thread's network namespace that have one."""
        if self._link < 0:
            return set()
        data = read_iterator(self._link, "sockhop_accepted")
        return {cookie for (cookie,) in struct.iter_unpack("=Q", data)}


def covered(sockets: Iterable[Socket], listening: Iterable[Socket]) -> set[int]:
    """Return the cookies of those of *sockets* whose own end one of *listening* listens at.

    A server gave them that end, unless a client has bound itself to it. This is for kernels that
    do not tell, and for those who listen with a backlog of 0.
    """
    ends: defaultdict[tuple[int, int], set[bytes]] = defaultdict(set)
    for each in listening:
        ends[each.netns, each.local_port].add(each.local_address)
    return {
        each.cookie
        for each in sockets
        if each.protocol == socket.IPPROTO_TCP
        and (there := ends.get((each.netns, each.local_port)))
        and not there.isdisjoint({each.local_address, *_ANY})
    }
