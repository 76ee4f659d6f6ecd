"""The sockets that an agent serves on: taken before it changes anything."""

import errno
import os
import socket
import stat
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from sockhop.errors import InputError, SystemLackError

__all__ = ["api_listener", "metrics_listeners", "remove_socket"]

_EXAMPLE = "such as 127.0.0.1:9464"


@contextmanager
def api_listener(path: Path) -> Iterator[socket.socket]:
    """Yield a Unix socket bound to *path* (0600 in a directory of 0700), on which nobody listens.

    Until somebody does, a client is told at once that no agent is there. The file goes at the end.
    SystemLackError where something else is there, or another agent.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as listener:
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            if not remove_socket(path):
                raise OSError(errno.EADDRINUSE, "another agent, or something else, is there")
            before = os.umask(0o177)
            try:
                listener.bind(str(path))
            finally:
                os.umask(before)
        except OSError as error:
            raise SystemLackError(
                f"{path}: {error.strerror or error}",
                hint="run as root, or name another socket with --api (SOCKHOP_API)",
            ) from None
        try:
            yield listener
        finally:
            path.unlink(missing_ok=True)


def remove_socket(path: Path) -> bool:
    """Remove the socket of an agent that is dead; return whether nothing is at *path* now.

    What is no socket stays, and one on which somebody listens.
    """
    try:
        if not stat.S_ISSOCK(path.stat().st_mode):
            return False
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.connect(str(path))
    except FileNotFoundError:
        return True
    except ConnectionRefusedError:
        path.unlink(missing_ok=True)
        return True
    return False


@contextmanager
def metrics_listeners(text: str) -> Iterator[list[socket.socket]]:
    """Yield a TCP socket that listens at each address of `HOST:PORT`, none for "".

    InputError where that is no address, or none to listen at.
    """
    with ExitStack() as stack:
        if not text:
            yield []
            return
        host, _, port = text.rpartition(":")
        if not host or not port.isdecimal() or not 0 <= int(port) <= 65535:
            raise InputError(f"--metrics {text}: expected HOST:PORT", hint=_EXAMPLE)
        try:
            listeners = list(_listen(host.strip("[]"), int(port), stack))
        except OSError as error:
            taken = error.errno == errno.EADDRINUSE
            raise InputError(
                f"--metrics {text}: {error.strerror or error}",
                hint="another program listens there" if taken else _EXAMPLE,
            ) from None
        yield listeners


def _listen(host: str, port: int, stack: ExitStack) -> Iterator[socket.socket]:
    flags = socket.AI_PASSIVE
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=flags)
    for family, kind, protocol, _, address in dict.fromkeys(found):
        listener = stack.enter_context(socket.socket(family, kind, protocol))
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        listener.bind(address)
        listener.listen()
        yield listener
