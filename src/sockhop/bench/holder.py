"""A process that holds sockets in network namespaces, for `sockhop bench sever`.

`python -m sockhop.bench.holder`: requests are read from standard input, a line of JSON each; each
is answered with a line. It ends with its input.
"""

import resource
import select
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import TypeAlias

import msgspec

from sockhop.bench.messages import Answer
from sockhop.errors import SockhopError
from sockhop.kernel import netns

__all__ = ["COMMAND", "MOST", "Await", "Close", "Group", "Holder", "Open", "Prepare"]

COMMAND = (sys.executable, "-P", "-m", "sockhop.bench.holder")
_PATIENCE = 20
"""Seconds without a socket that ends."""

MOST = 15_000
"""Sockets of one process: some systems allow 20,000 descriptors."""

_SYSCTLS = {"net/core/somaxconn": "1000000", "net/ipv4/ip_local_port_range": "1024 65535"}


class Prepare(msgspec.Struct, tag=True):
    """Serve TCP on `port` of every address in the namespaces; nobody accepts."""

    namespaces: list[str]
    port: int


class Group(msgspec.Struct):
    """So many connected sockets in a namespace, half of them TCP, to an address and port."""

    namespace: str
    count: int
    address: str
    port: int


class Open(msgspec.Struct, tag=True):
    """Make sockets, and keep them under `name`."""

    name: str
    groups: list[Group]


class Close(msgspec.Struct, tag=True):
    """Close all sockets of a name."""

    name: str


class Await(msgspec.Struct, tag=True):
    """Rename a file, and wait until all sockets of a name have ended.

    The answer is how many seconds that took, from just before the rename.
    """

    name: str
    source: str
    target: str


HolderRequest: TypeAlias = Prepare | Open | Close | Await


class Holder:
    """A running holder, seen from the process that started it."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process

    def ask(self, request: HolderRequest) -> float:
        """Send a request and return the answer; SockhopError where it failed."""
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(msgspec.json.encode(request) + b"\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        answer = msgspec.json.decode(line, type=Answer) if line else Answer(error="it ended")
        if answer.error:
            raise SockhopError(f"a holder of sockets failed: {answer.error}")
        return answer.value

    def end(self) -> None:
        """End it, and with it its sockets."""
        self._process.kill()
        self._process.communicate()


class _Sockets:
    def __init__(self) -> None:
        self._held: dict[str, list[socket.socket]] = {}

    def answer(self, request: HolderRequest) -> float:
        match request:
            case Await():
                return self._await(request)
            case Prepare():
                for path in request.namespaces:
                    with netns.entered(Path(path)):
                        self._serve(request.port)
            case Open():
                for group in request.groups:
                    with netns.entered(Path(group.namespace)):
                        self._connect(request.name, group)
            case Close():
                for own in self._held.pop(request.name, []):
                    own.close()
        return 0

    def _serve(self, port: int) -> None:
        for name, value in _SYSCTLS.items():
            Path("/proc/sys", name).write_text(value)
        server = socket.create_server(("", port), backlog=1_000_000)
        self._held.setdefault("servers", []).append(server)

    def _connect(self, name: str, group: Group) -> None:
        held = self._held.setdefault(name, [])
        to = (group.address, group.port)
        for number in range(group.count):
            kind = socket.SOCK_DGRAM if number % 2 else socket.SOCK_STREAM
            held.append(socket.socket(socket.AF_INET, kind))
            held[-1].connect(to)

    def _await(self, request: Await) -> float:
        with select.epoll() as poll:
            left = {own.fileno() for own in self._held[request.name]}
            for fd in left:
                poll.register(fd, select.EPOLLERR | select.EPOLLHUP)
            begin = time.monotonic()
            Path(request.source).rename(request.target)
            while left:
                ended = {fd for fd, _ in poll.poll(_PATIENCE)}
                if not ended:
                    raise OSError(f"{len(left)} sockets have not ended after {_PATIENCE} s")
                left -= ended
                for fd in ended:
                    poll.unregister(fd)
            return time.monotonic() - begin


def _main() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    sockets = _Sockets()
    decoder = msgspec.json.Decoder(HolderRequest)
    with suppress(KeyboardInterrupt):
        for line in sys.stdin.buffer:
            try:
                answer = Answer(sockets.answer(decoder.decode(line)))
            except OSError as error:
                answer = Answer(error=str(error))
            sys.stdout.buffer.write(msgspec.json.encode(answer) + b"\n")
            sys.stdout.buffer.flush()


if __name__ == "__main__":
    _main()
