"""Whether TCP connections still make progress: what their peers have sent, asked for if need be."""

import os
import socket
import struct
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress

from sockhop.datapath.sockets import Socket
from sockhop.kernel.procfs import borrowed, find_holders
from sockhop.kernel.syscall import KernelError

__all__ = ["Progress", "probe_peers", "progress_of"]

Progress = tuple[int, int, int]
"""Bytes that the peer has acknowledged, bytes received, segments received (all from the peer)."""

_BATCH = 500
_FIRES = 0.02
"""Seconds in which a timer that is due at once has fired, also on a busy kernel (a jiffy is at most
10 ms)."""

_IDLE = 1
"""The least TCP_KEEPIDLE, in seconds."""

_OPTIONS = (
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 127),
    (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 0),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _IDLE),  # last: it starts the timer
)


def progress_of(found: Socket) -> Progress:
    """Return what *found* has had from its peer so far."""
    return found.acknowledged, found.received, found.segments


def probe_peers(sockets: Iterable[Socket]) -> set[int]:
    """Send a keepalive probe from each socket; return the cookies of those that sent one.

    A peer that lives answers it with a segment (RFC 9293, 3.8.4). The kernel sends one when a
    socket that has been idle for a second gets SO_KEEPALIVE and TCP_KEEPIDLE of a second
    (net/ipv4/tcp.c, tcp_sock_set_keepidle_locked); the options are as before 20 ms later. A socket
    that no process holds, or whose process may not be looked into, cannot be asked, and one that
    heard from its peer within the last second need not be.
    """
    wanted = {found.inode: found for found in sockets if found.inode}
    holders = find_holders(wanted)
    reached: set[int] = set()
    inodes = list(holders)
    for first in range(0, len(inodes), _BATCH):  # each takes a descriptor
        with ExitStack() as stack:
            for inode in inodes[first : first + _BATCH]:
                for holder in holders[inode]:
                    with suppress(KernelError, OSError):
                        own = stack.enter_context(borrowed(holder))
                        # The descriptor may have become another socket's.
                        if os.fstat(own.fileno()).st_ino != inode:
                            continue
                        if _idle(own) > 1000 * _IDLE:
                            stack.enter_context(_probing(own))
                            reached.add(wanted[inode].cookie)
                        break
            time.sleep(_FIRES)
    return reached


def _idle(own: socket.socket) -> int:
    """Return the milliseconds since anything came from the peer (struct tcp_info)."""
    info = own.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 60)
    data, ack = struct.unpack_from("=II", info, 52)  # tcpi_last_data_recv, tcpi_last_ack_recv
    return int(min(data, ack))


@contextmanager
def _probing(own: socket.socket) -> Iterator[None]:
    before = [(level, name, own.getsockopt(level, name)) for level, name, _ in _OPTIONS]
    try:
        for level, name, value in _OPTIONS:
            own.setsockopt(level, name, value)
        yield
    finally:
        for level, name, value in reversed(before):
            with suppress(OSError):  # it has ended meanwhile
                own.setsockopt(level, name, value)
