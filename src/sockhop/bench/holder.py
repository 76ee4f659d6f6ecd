"""A process that holds sockets in network namespaces, for `sockhop bench sever`.

`python -m sockhop.bench.holder`: requests are read from standard input, a line of JSON each; each
is answered with a line. It ends with its input.
"""

import resource
import socket
import sys
from contextlib import suppress
from pathlib import Path

import msgspec

from sockhop.kernel import netns

__all__ = ["MOST", "Close", "Group", "Open", "Prepare"]

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


class _Holder:
    def __init__(self) -> None:
        self._held: dict[str, list[socket.socket]] = {}

    def answer(self, request: Prepare | Open | Close) -> None:
        match request:
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


def _main() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    holder = _Holder()
    decoder = msgspec.json.Decoder(Prepare | Open | Close)
    with suppress(KeyboardInterrupt):
        for line in sys.stdin.buffer:
            try:
                holder.answer(decoder.decode(line))
                said = ""
            except OSError as error:
                said = str(error)
            sys.stdout.write(msgspec.json.encode(said).decode() + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    _main()
