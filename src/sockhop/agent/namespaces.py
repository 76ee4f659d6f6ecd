"""The network namespaces that services name by path."""

import logging
from collections.abc import Iterable
from pathlib import Path

from sockhop.errors import SockhopError
from sockhop.kernel import netns
from sockhop.model import Desired

__all__ = ["NamespaceFinder"]

_LOG = logging.getLogger(__name__)


class NamespaceFinder:
    """Turns paths into cookies, and remembers them by inode: a path may come to name another."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[int, int]] = {}
        self._missing: dict[str, str] = {}

    def find(self, desired: Desired) -> dict[str, int]:
        """Return the cookies of all paths of *desired* but those that cannot be entered."""
        wanted = {path for service in desired.services for path in _paths(service.clients)}
        self._known = {path: self._known[path] for path in wanted & self._known.keys()}
        self._missing = {path: self._missing.get(path, "") for path in wanted}
        for path in wanted:
            self._look(path)
        return {path: cookie for path, (_, cookie) in self._known.items()}

    def outdated(self) -> bool:
        """Whether a path names another namespace than it did, or one where it did not."""
        return any(
            _inode(path) != (self._known[path][0] if path in self._known else 0)
            for path in self._missing
        )

    def _look(self, path: str) -> None:
        inode = _inode(path)
        if path in self._known and self._known[path][0] == inode:
            return
        self._known.pop(path, None)
        try:
            with netns.entered(Path(path)):
                self._known[path] = (inode, netns.current_cookie())
            self._missing[path] = ""
        except SockhopError as error:
            if self._missing[path] != str(error):
                _LOG.warning("clients.namespaces: not served there: %s", error)
            self._missing[path] = str(error)


def _paths(clients: object) -> Iterable[str]:
    chosen = getattr(clients, "namespaces", None)
    return chosen if isinstance(chosen, tuple) else ()


def _inode(path: str) -> int:
    try:
        return netns.inode(Path(path))
    except OSError:
        return 0
