"""Tries on the running kernel what splicing relies on, with two sockets of our own.

Nothing is attached to a cgroup. Each wait is bounded, so that a fault shows as an answer.
"""

import contextlib
import random
import select
import socket
import struct
from collections.abc import Iterator

from sockhop.kernel._libbpf import ffi, lib
from sockhop.kernel.objects import BpfObject, object_path
from sockhop.kernel.syscall import check

__all__ = ["check_splicing", "entries_outlive_connections"]

_PATIENCE = 2000
"""Milliseconds until bytes count as lost."""
_LONG = 60_000


class _Fault(Exception):
    """What the kernel does wrong."""


def check_splicing() -> str:
    """Return what is wrong with redirecting messages on this kernel; "" if nothing was found.

    SystemLackError where it cannot be tried.
    """
    try:
        with BpfObject(object_path("vanilla")) as programs:
            sockets = programs.map_fd("vanilla_sockets")
            message = programs.program("vanilla_message")
            check(
                lib.bpf_prog_attach(message, sockets, lib.BPF_SK_MSG_VERDICT, 0),
                "attaching to a sockhash",
            )
            for trial in (_bytes_stay_whole, _unread_bytes_survive, _a_closed_reader_is_noticed):
                with _pair(sockets) as (one, other):
                    trial(one, other)
    except _Fault as fault:
        return str(fault)
    except OSError as error:
        return f"two sockets on 127.0.0.1 to try it with: {error.strerror}"
    return ""


def entries_outlive_connections() -> bool:
    """Tell whether a socket whose connection was reset stays in a sockhash until it is closed.

    Then a sockhash by addresses meets stale entries. SystemLackError where it cannot be tried.
    """
    with BpfObject(object_path("vanilla")) as programs:
        sockets = programs.map_fd("vanilla_sockets")
        with _pair(sockets) as (one, other):
            one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            key = _key(other)
            one.close()
            poll = select.poll()
            poll.register(other, select.POLLHUP)
            poll.poll(_PATIENCE)
            held = ffi.new("__u64 *")
            return bool(lib.bpf_map_lookup_elem(sockets, key, held) == 0)


@contextlib.contextmanager
def _pair(sockets: int) -> Iterator[tuple[socket.socket, socket.socket]]:
    """Yield two connected sockets that are in the sockhash."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        one = socket.create_connection(listener.getsockname(), 2)
        other = listener.accept()[0]
    with one, other:
        for each in (one, other):
            each.setblocking(False)
            value = struct.pack("=Q", each.fileno())
            check(lib.bpf_map_update_elem(sockets, _key(each), value, 0), "filling a sockhash")
        yield one, other


def _key(of: socket.socket) -> bytes:
    ends = of.getsockname(), of.getpeername()
    return b"".join(map(_address, ends)) + struct.pack("=II", ends[0][1], ends[1][1])


def _address(name: tuple[str, int]) -> bytes:
    return bytes(12) + socket.inet_aton(name[0])


def _read(of: socket.socket, size: int) -> bytes:
    """Read *size* bytes, fewer at the end of the stream."""
    data = b""
    while len(data) < size:
        poll = select.poll()
        poll.register(of, select.POLLIN)
        if not poll.poll(_PATIENCE):
            raise _Fault(f"{size - len(data)} redirected bytes did not arrive")
        try:
            more = of.recv(min(4093, size - len(data)))
        except ConnectionResetError:
            break
        if not more:
            break
        data += more
    return data


def _bytes_stay_whole(one: socket.socket, other: socket.socket) -> None:
    sent = random.Random(_LONG).randbytes(_LONG)
    for source, target in ((one, other), (other, one)):
        rest = memoryview(sent)
        while rest:
            rest = rest[source.send(rest) :]
        if _read(target, _LONG) != sent:
            raise _Fault("redirected bytes arrived changed")


def _unread_bytes_survive(one: socket.socket, other: socket.socket) -> None:
    one.send(b"unread")
    one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    one.close()
    if _read(other, 7) != b"unread":
        raise _Fault("redirected bytes were lost when the sender reset the connection")


def _a_closed_reader_is_noticed(one: socket.socket, other: socket.socket) -> None:
    other.close()
    poll = select.poll()
    poll.register(one, select.POLLIN)
    if not poll.poll(_PATIENCE) or one.recv(1):
        raise _Fault("a socket did not see that its peer had closed")
    for _ in range(3):
        try:
            one.send(b"x")
        except (BrokenPipeError, ConnectionResetError):
            return
        poll.poll(50)
    raise _Fault("send() to a closed peer goes on succeeding")
