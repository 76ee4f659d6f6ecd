"""What programs and tools see of a connection, plain or spliced: the rows of the table in the docs.

Each function is a row: it plays with a new connection and says what it saw. Its docstring is what
the row is about.
"""

import array
import contextlib
import errno
import fcntl
import os
import select
import signal
import socket
import struct
import subprocess
import tempfile
import termios
import threading
import time
from collections.abc import Callable

from tests.splice.sequences import disconnect
from tests.splice.stage import Place, Stage
from tests.splice.tcpinfo import tcp_info

__all__ = ["ROWS", "Ends"]

_SO_ZEROCOPY, _MSG_ZEROCOPY, _MSG_ERRQUEUE = 60, 0x4000000, 0x2000
_SO_TIMESTAMP = 29


class Ends:
    """Both ends of a new connection, whose first messages were exchanged."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.client, self.server = stage.connected(Place.LOOPBACK4)
        for one, other in ((self.client, self.server), (self.server, self.client)):
            one.sendall(b"first")
            assert other.recv(5) == b"first"
            one.settimeout(2)

    def __enter__(self) -> "Ends":
        return self

    def __exit__(self, *_: object) -> None:
        self.client.close()
        self.server.close()


def _error(call: Callable[[], object]) -> str:
    try:
        return repr(call())
    except TimeoutError:
        return "nothing"
    except OSError as error:
        return errno.errorcode[error.errno or 0]


def _poll(of: socket.socket, seconds: float = 0.2) -> str:
    poll = select.poll()
    poll.register(of, select.POLLIN)
    return "readable" if poll.poll(seconds * 1000) else "not readable"


def _send_later(ends: Ends, seconds: float, data: bytes) -> None:
    def send() -> None:
        with contextlib.suppress(OSError):  # the row is over
            ends.client.send(data)

    threading.Timer(seconds, send).start()


def poll_and_select(ends: Ends) -> str:
    """`poll()` and `select()` before and after bytes arrive"""
    before = _poll(ends.server, 0)
    ends.client.send(b"hello")
    selected = bool(select.select([ends.server], [], [], 0.2)[0])
    return f"{before}, then {_poll(ends.server)}{'' if selected else ', not to select()'}"


def _events(of: socket.socket, flags: int, ends: Ends) -> str:
    with select.epoll() as epoll:
        epoll.register(of, select.EPOLLIN | flags)
        seen = [len(epoll.poll(0))]
        for _ in range(2):
            ends.client.send(b"hello")
            seen.append(len(epoll.poll(0.2)))
        time.sleep(0.05)
        seen.append(len(epoll.poll(0.05)))
        of.recv(100)
        seen.append(len(epoll.poll(0.05)))
    return ", ".join(map(str, seen))


def epoll_level(ends: Ends) -> str:
    """`epoll`, level-triggered: events before, after each of two messages, later, after reading"""
    return _events(ends.server, 0, ends)


def epoll_edge(ends: Ends) -> str:
    """`epoll`, edge-triggered: the same"""
    return _events(ends.server, select.EPOLLET, ends)


def fionread(ends: Ends) -> str:
    """`ioctl(FIONREAD)` with 5 unread bytes"""
    ends.client.send(b"hello")
    _poll(ends.server)
    count = array.array("i", [0])
    fcntl.ioctl(ends.server, termios.FIONREAD, count)
    return str(count[0])


def peek(ends: Ends) -> str:
    """`recv(MSG_PEEK)`, then `recv()`, of two messages"""
    ends.client.send(b"one")
    ends.client.send(b"two")
    _poll(ends.server)
    time.sleep(0.05)
    peeked = ends.server.recv(100, socket.MSG_PEEK)
    return f"{peeked!r}, {ends.server.recv(100)!r}"


def wait_all(ends: Ends) -> str:
    """`recv(10, MSG_WAITALL)` when 5 bytes come, and 5 more a little later"""
    ends.server.settimeout(None)
    _send_later(ends, 0.2, b"later")
    ends.client.send(b"hello")
    return repr(ends.server.recv(10, socket.MSG_WAITALL))


def receive_low_water(ends: Ends) -> str:
    """`poll()` with `SO_RCVLOWAT` 10 and 5 bytes"""
    ends.server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 10)
    ends.client.send(b"hello")
    return _poll(ends.server)


def receive_timeout(ends: Ends) -> str:
    """`recv()` with `SO_RCVTIMEO` 0.2 s, when nothing comes"""
    ends.server.settimeout(None)
    ends.server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", 0, 200_000))
    begin = time.monotonic()
    result = _error(lambda: ends.server.recv(10))
    return f"{result} after {time.monotonic() - begin:.1f} s"


def truncate(ends: Ends) -> str:
    """`recv(3, MSG_TRUNC)` with 5 unread bytes, then `recv()`"""
    ends.client.send(b"hello")
    _poll(ends.server)
    buffer = bytearray(3)
    size = ends.server.recv_into(buffer, 3, socket.MSG_TRUNC)
    rest = ends.server.recv(10)
    return f"{size} bytes are {'read' if any(buffer) else 'dropped'}, then {rest!r}"


def splice_from(ends: Ends) -> str:
    """`splice()` from the socket to a pipe, 5 bytes unread"""
    ends.client.send(b"hello")
    _poll(ends.server)
    out, into = os.pipe()
    ends.server.setblocking(False)
    try:
        return _error(lambda: os.splice(ends.server.fileno(), into, 100))
    finally:
        os.close(out)
        os.close(into)


def splice_to(ends: Ends) -> str:
    """`splice()` from a pipe to the socket"""
    out, into = os.pipe()
    os.write(into, b"hello")
    os.splice(out, ends.client.fileno(), 5)
    os.close(out)
    os.close(into)
    return repr(ends.server.recv(10))


def send_file(ends: Ends) -> str:
    """`sendfile()` of 20,000 bytes to the socket"""
    with tempfile.TemporaryFile() as file:
        file.write(bytes(range(200)) * 100)
        file.flush()
        os.sendfile(ends.client.fileno(), file.fileno(), 0, 20_000)
    data = b""
    while len(data) < 20_000 and (more := ends.server.recv(20_000)):
        data += more
    return "arrives whole" if data == bytes(range(200)) * 100 else "arrives changed"


def zero_copy(ends: Ends) -> str:
    """`send(MSG_ZEROCOPY)`: its completion on the error queue"""
    ends.client.setsockopt(socket.SOL_SOCKET, _SO_ZEROCOPY, 1)
    ends.client.send(b"x" * 20_000, _MSG_ZEROCOPY)
    ends.server.recv(20_000)
    time.sleep(0.1)
    ends.client.setblocking(False)
    try:
        ends.client.recvmsg(10, 200, _MSG_ERRQUEUE)
    except BlockingIOError:
        return "never comes"
    return "comes"


def out_of_band(ends: Ends) -> str:
    """`send(MSG_OOB)` of one byte: where it is read"""
    ends.client.send(b"in")
    ends.client.send(b"!", socket.MSG_OOB)
    time.sleep(0.1)
    urgent = _error(lambda: ends.server.recv(1, socket.MSG_OOB))
    return f"out of band {urgent}, in band {ends.server.recv(10)!r}"


def timestamps(ends: Ends) -> str:
    """`SO_TIMESTAMP` on `recvmsg()`"""
    ends.server.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMP, 1)
    time.sleep(0.2)  # the kernel begins to stamp from a work queue
    ends.client.send(b"hello")
    _poll(ends.server)
    return "a timestamp" if ends.server.recvmsg(10, 200)[1] else "none"


def info(ends: Ends) -> str:
    """`getsockopt(TCP_INFO)`: bytes sent after `send()` of 5"""
    before = tcp_info(ends.client).bytes_sent
    ends.client.send(b"hello")
    _poll(ends.server)
    return str(tcp_info(ends.client).bytes_sent - before)


def ss(ends: Ends) -> str:
    """`ss -ti`: `bytes_sent` appears"""
    port = ends.client.getsockname()[1]
    said = subprocess.run(
        ["ss", "-tiHn", f"sport = :{port}"], capture_output=True, text=True, check=True
    ).stdout
    return "yes" if "bytes_sent" in said else "no"


def capture(ends: Ends) -> str:
    """`tcpdump`: the bytes on the wire"""
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3)) as wire:
        wire.settimeout(0.3)
        ends.client.send(b"needle")
        try:
            while b"needle" not in wire.recv(2000):
                pass
        except TimeoutError:
            return "not seen"
    return "seen"


def _blocked(of: socket.socket, number: int = 1) -> tuple[list[str], list[threading.Thread]]:
    """Let threads wait in recv(), without a timeout."""
    of.settimeout(None)
    said: list[str] = []
    threads = [
        threading.Thread(target=lambda: said.append(_error(lambda: of.recv(10))), daemon=True)
        for _ in range(number)
    ]
    for thread in threads:
        thread.start()
    time.sleep(0.2)
    return said, threads


def two_readers(ends: Ends) -> str:
    """Two threads in a blocking `recv()`, one message comes, half a second later another"""
    said, threads = _blocked(ends.server, 2)
    ends.client.send(b"one")
    time.sleep(0.5)
    ends.client.send(b"two")
    for thread in threads:
        thread.join(2)
    return ", ".join(sorted(said))


def reset_while_blocked(ends: Ends) -> str:
    """A blocking `recv()` when an RST comes"""
    said, threads = _blocked(ends.server)
    ends.client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    ends.client.close()
    threads[0].join(2)
    again = _error(lambda: ends.server.recv(10))
    return f"{said[0]}, then {again}"


def signal_while_blocked(ends: Ends) -> str:
    """A blocking `recv()` when a signal is handled and bytes come 0.3 s later"""
    ends.server.settimeout(None)
    caught = []
    old = signal.signal(signal.SIGALRM, lambda *_: caught.append(1))
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    _send_later(ends, 0.5, b"hello")
    try:
        return _error(lambda: ends.server.recv(10))
    finally:
        signal.signal(signal.SIGALRM, old)


def send_after_reset(ends: Ends) -> str:
    """Three `send()` after an RST has come"""
    ends.client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    ends.client.close()
    time.sleep(0.1)
    return ", ".join(_error(lambda: ends.server.send(b"x")) for _ in range(3))


def close_unread(ends: Ends) -> str:
    """`close()` with unread bytes: what the peer reads"""
    ends.client.send(b"never read")
    _poll(ends.server)
    ends.server.close()
    return _error(lambda: ends.client.recv(10))


def disconnect_unread(ends: Ends) -> str:
    """`connect(AF_UNSPEC)` with unread bytes, then `recv()`"""
    ends.client.send(b"unread")
    _poll(ends.server)
    disconnect(ends.server)
    ends.server.setblocking(False)
    return _error(lambda: ends.server.recv(10))


def low_latency(ends: Ends) -> str:
    """`recv()` of two messages that came one after the other, with a large buffer"""
    ends.client.send(b"one")
    ends.client.send(b"two")
    time.sleep(0.1)
    return repr(ends.server.recv(100))


ROWS: tuple[Callable[[Ends], str], ...] = (
    poll_and_select,
    epoll_level,
    epoll_edge,
    low_latency,
    receive_timeout,
    send_file,
    splice_to,
    send_after_reset,
    signal_while_blocked,
    fionread,
    peek,
    truncate,
    wait_all,
    receive_low_water,
    splice_from,
    zero_copy,
    out_of_band,
    timestamps,
    two_readers,
    reset_while_blocked,
    close_unread,
    disconnect_unread,
    info,
    ss,
    capture,
)
