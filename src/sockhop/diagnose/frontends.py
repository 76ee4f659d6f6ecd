"""What sockhop does here with connections to an address: whose frontend it is, where they go."""

import socket
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from sockhop.datapath.balancer import BalanceMaps, NotInstalled
from sockhop.datapath.memory import SocketMemory
from sockhop.datapath.records import BackendRecord, FrontendKey, word_count
from sockhop.kernel.cookies import socket_cookie
from sockhop.model import endpoint, unpack_address

__all__ = ["Address", "Frontend", "Frontends", "named"]


class Address(NamedTuple):
    """A packed address and a port."""

    address: bytes
    port: int


class Frontend(NamedTuple):
    """A frontend, as the sockets of one namespace meet it.

    `backends`: all of its service; `serves`: whether a connection can go to any of them.
    """

    service: str
    backends: list[BackendRecord]
    serves: bool


class Frontends:
    """The pinned maps below *pins*, if there are any; use as a context manager."""

    def __init__(self, pins: Path) -> None:
        self._stack = ExitStack()
        self._maps: BalanceMaps | None = None
        self._memory: SocketMemory | None = None
        try:
            self._maps = self._stack.enter_context(BalanceMaps(pins))
            self._memory = self._stack.enter_context(SocketMemory(pins))
        except (NotInstalled, FileNotFoundError):
            self._stack.close()
            self._maps = None

    def __enter__(self) -> "Frontends":
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def at(self, target: Address, netns_cookie: int) -> Frontend | None:
        """Return the TCP frontend at *target* for sockets of that namespace."""
        if self._maps is None:
            return None
        key = FrontendKey(target.address, 0, target.port, socket.IPPROTO_TCP)
        found = self._maps.find_frontend(key, netns_cookie)
        if found is None:
            return None
        service = found[1].service
        backends = [each for _, each in self._maps.backends.items() if each.service == service]
        record = self._maps.services.get(service)
        name = record.name.rstrip(b"\0").decode(errors="replace") if record else "?"
        return Frontend(name, backends, bool(word_count(self._maps.words.get(found[1].id) or 0)))

    def backend_of(self, own: socket.socket) -> Address | None:
        """Return where a socket of this process went instead of where it dialled."""
        if self._memory is None:
            return None
        cookie = socket_cookie(own)
        kept = self._memory.provenance(own) or self._memory.provenance_by_cookie(cookie)
        return Address(kept.backend_address, kept.backend_port) if kept else None


def named(at: Address) -> str:
    """Return it as people write it."""
    return endpoint(unpack_address(at.address), at.port)
