"""The network namespaces and cgroups that services name by path."""

import logging
from collections.abc import Callable
from pathlib import Path

from sockhop.errors import SockhopError
from sockhop.kernel import netns
from sockhop.kernel.cgroups import cgroup_id, cgroup_root
from sockhop.model import Clients, Desired

__all__ = ["PlaceFinder"]

_LOG = logging.getLogger(__name__)


class PlaceFinder:
    """Turns paths into cookies and ids, and remembers them by inode: a path may change hands."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[int, int]] = {}
        self._wanted: dict[str, Path] = {}
        self._complaints: dict[str, str] = {}

    def find(self, desired: Desired) -> dict[str, int]:
        """Return the cookies of all namespaces and the ids of all cgroups that *desired* names.

        Those that are not there, or cannot be entered, are left out and logged.
        """
        chosen = [service.clients for service in desired.services if service.clients]
        spaces = {path: Path(path) for clients in chosen for path in _namespaces(clients)}
        groups = {path: _cgroup(path) for c in chosen for path in (*c.cgroups, *c.exclude)}
        self._wanted = spaces | groups
        self._known = {path: self._known[path] for path in self._wanted & self._known.keys()}
        for path in self._wanted:
            self._look(path, cgroup_id if path in groups else _cookie)
        return {path: found for path, (_, found) in self._known.items()}

    def outdated(self) -> bool:
        """Whether a path names another place than it did, or one where it did not."""
        return any(
            _inode(place) != self._known.get(path, (0, 0))[0]
            for path, place in self._wanted.items()
        )

    def _look(self, path: str, identify: Callable[[Path], int]) -> None:
        place = self._wanted[path]
        inode = _inode(place)
        if path in self._known and self._known[path][0] == inode:
            return
        self._known.pop(path, None)
        try:
            self._known[path] = inode, identify(place)
            self._complaints.pop(path, None)
        except SockhopError as error:
            if self._complaints.get(path) != str(error):
                _LOG.warning("clients: not served there: %s", error)
            self._complaints[path] = str(error)


def _namespaces(clients: Clients) -> tuple[str, ...]:
    return clients.namespaces if isinstance(clients.namespaces, tuple) else ()


def _cgroup(path: str) -> Path:
    return cgroup_root() / path.lstrip("/")


def _cookie(path: Path) -> int:
    with netns.entered(path):
        return netns.current_cookie()


def _inode(path: Path) -> int:
    try:
        return path.stat().st_ino
    except OSError:
        return 0
