"""Lists any sockets, with what is remembered of those that are balanced."""

import socket
from collections.abc import Iterable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from sockhop.datapath.balancer import NotInstalled
from sockhop.datapath.memory import SocketMemory
from sockhop.datapath.sockets import Socket, Sockets
from sockhop.kernel import netns
from sockhop.kernel.namespaces import Namespace, NamespaceGone, entered
from sockhop.kernel.sockdiag import list_sockets

__all__ = ["PROTOCOLS", "Listing", "list_here"]

PROTOCOLS = (socket.IPPROTO_TCP, socket.IPPROTO_UDP)


class Listing:
    """Asks SOCK_DIAG for sockets, and the maps below a bpffs directory for their provenance.

    Where no maps are, every socket is unmanaged. A socket that comes or goes meanwhile may be
    missed.
    """

    def __init__(self, pins: Path) -> None:
        self._stack = ExitStack()
        self._sockets: Sockets | None = None
        with suppress(NotInstalled):
            self._sockets = self._stack.enter_context(Sockets(pins))
            self._memory = self._stack.enter_context(SocketMemory(pins))

    def close(self) -> None:
        """Close the descriptors."""
        self._stack.close()

    def __enter__(self) -> "Listing":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def here(self, protocols: Iterable[int] = PROTOCOLS, **options: Any) -> list[Socket]:
        """Return the sockets of this thread's network namespace; *options*: see list_sockets()."""
        return self.with_origins(list_here(protocols, **options))

    def everywhere(
        self, namespaces: Iterable[Namespace], protocols: Iterable[int] = PROTOCOLS, **options: Any
    ) -> list[Socket]:
        """Return the sockets of *namespaces*, those that are still there, as :meth:`here` does."""
        found: list[Socket] = []
        for namespace in namespaces:
            with suppress(NamespaceGone), entered(namespace):
                found += list_here(protocols, **options)
        return self.with_origins(found)

    def remembered(self) -> list[Socket]:
        """Return the sockets with a provenance, also of namespaces that cannot be entered."""
        return self._sockets.remembered() if self._sockets else []

    def with_origins(self, found: list[Socket]) -> list[Socket]:
        """Return sockets listed by :func:`list_here` with what is remembered of them."""
        # Looked up last, so that no socket which was balanced meanwhile is taken for unmanaged.
        if self._sockets is None:
            return found
        origins = {each.cookie: each.origin for each in self._sockets.remembered()}
        origins |= self._memory.provenances_by_cookie()
        return [each._replace(origin=origins.get(each.cookie)) for each in found]


def list_here(protocols: Iterable[int] = PROTOCOLS, **options: Any) -> list[Socket]:
    """Return the sockets of this thread's network namespace, as if they were all unmanaged."""
    number = netns.inode()
    return [
        Socket._make((*found, number, None))
        for protocol in protocols
        for found in list_sockets(protocol, **options)
    ]
