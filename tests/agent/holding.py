"""Servers that keep their connections open, and clients that look at theirs."""

import contextlib
import errno
import socket
import threading

from tests.sandbox import wait_until

__all__ = ["HoldingServer", "dial", "ended", "is_open"]


class HoldingServer:
    """A TCP server that answers what it is sent and never closes a connection by itself."""

    def __init__(self, address: str, port: int = 0) -> None:
        self._listener = socket.create_server((address, port), backlog=1024)
        self.address, self.port = self._listener.getsockname()
        self.connections: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def endpoint(self) -> str:
        return f"{self.address}:{self.port}"

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                self.connections.append(connection)
                threading.Thread(target=self._echo, args=(connection,), daemon=True).start()

    @staticmethod
    def _echo(connection: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := connection.recv(4096):
                connection.sendall(data)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        for each in (self._listener, *self.connections):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()

    def __enter__(self) -> "HoldingServer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def dial(address: str, port: int = 80, *, n: int = 1) -> list[socket.socket]:
    """Return *n* TCP connections."""
    made = [socket.create_connection((address, port), timeout=5) for _ in range(n)]
    for each in made:
        each.setblocking(False)
    return made


def error_of(each: socket.socket) -> int:
    """Return the error that waits for the program, 0 for none, without taking it."""
    try:
        each.recv(1, socket.MSG_PEEK)
    except BlockingIOError:
        return 0
    except OSError as error:
        return error.errno or -1
    return 0


def is_open(each: socket.socket) -> bool:
    """Whether a TCP connection still carries something there and back."""
    try:
        each.send(b"x")
        return bool(wait_until(lambda: _received(each), "the echo", seconds=2))
    except OSError:
        return False


def _received(each: socket.socket) -> bool:
    try:
        return each.recv(1) == b"x"
    except BlockingIOError:
        return False


def ended(each: socket.socket, seconds: float = 5) -> None:
    """Wait until a program finds its socket aborted (ECONNABORTED)."""
    wait_until(lambda: _aborted(each), "the socket to be ended", seconds)


def _aborted(each: socket.socket) -> bool:
    try:
        each.recv(1)
    except BlockingIOError:
        return False
    except OSError as error:
        return error.errno == errno.ECONNABORTED
    return False
