"""The network namespaces and cgroups that services and policies name by path."""

import logging
import re
from collections.abc import Callable, Iterable
from pathlib import Path, PurePosixPath

from sockhop.agent.policy_table import Place
from sockhop.errors import SockhopError
from sockhop.kernel import netns
from sockhop.kernel.cgroups import cgroup_id, cgroup_root, groups_below
from sockhop.model import Clients, Desired

__all__ = ["PlaceFinder"]

_LOG = logging.getLogger(__name__)
_POD = "pod:"
# With the systemd driver of the kubelet kubepods-burstable-pod1_2.slice, else pod1-2.
_POD_GROUP = re.compile(r"(?:.*-)?pod([^-.]+|[^_.]+)(?:\.slice)?")


class PlaceFinder:
    """Turns paths into cookies and ids, and remembers them by inode: a path may change hands."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[int, int]] = {}
        self._wanted: dict[str, Path] = {}
        self._groups: frozenset[str] = frozenset()
        self._complaints: dict[str, str] = {}

    def find(self, desired: Desired) -> dict[str, int]:
        """Return the cookies of all namespaces and the ids of all cgroups that *desired* names.

        Those that are not there, or cannot be entered, are left out and logged.
        """
        chosen = [service.clients for service in desired.services if service.clients]
        chosen += [policy.clients for policy in desired.policies if policy.clients]
        spaces = {path: Path(path) for clients in chosen for path in _namespaces(clients)}
        groups = _cgroups(path for c in chosen for path in (*c.cgroups, *c.exclude))
        self._groups = frozenset(groups)
        self._wanted = spaces | groups
        self._known = {path: self._known[path] for path in self._wanted & self._known.keys()}
        for path in self._wanted:
            self._look(path, cgroup_id if path in groups else _cookie)
        return self.found

    @property
    def found(self) -> dict[str, int]:
        """What :meth:`find` returned last."""
        return {path: found for path, (_, found) in self._known.items()}

    def cgroups(self) -> dict[str, Place]:
        """Return where the cgroups are that :meth:`find` was asked for, by the same paths."""
        root = cgroup_root().resolve()
        found = {}
        for path in self._groups & self._known.keys():
            real = self._wanted[path].resolve()
            if real.is_relative_to(root):
                inside = PurePosixPath("/") / real.relative_to(root)
                found[path] = Place(self._known[path][1], inside)
        return found

    def missing(self, clients: Clients | None) -> list[str]:
        """Return the paths of *clients* that were not found."""
        if clients is None:
            return []
        paths = (*_namespaces(clients), *clients.cgroups, *clients.exclude)
        return [path for path in paths if path not in self._known]

    def outdated(self) -> bool:
        """Whether a path names another place than it did, or one where it did not."""
        if any(path.startswith(_POD) for path in self._groups - self._known.keys()):
            self._wanted |= _cgroups(self._groups - self._known.keys())
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
                _LOG.warning("clients: nobody is there: %s", error)
            self._complaints[path] = str(error)


def _namespaces(clients: Clients) -> tuple[str, ...]:
    return clients.namespaces if isinstance(clients.namespaces, tuple) else ()


def _cgroups(paths: Iterable[str]) -> dict[str, Path]:
    """Return where cgroups should be; those of Pods that are not there lead nowhere."""
    named = dict.fromkeys(paths)
    root = cgroup_root()
    pods = _pods() if any(path.startswith(_POD) for path in named) else {}
    return {
        path: pods.get(path, root / path) if path.startswith(_POD) else root / path.lstrip("/")
        for path in named
    }


def _pods() -> dict[str, Path]:
    """Return the cgroups of all Pods on this node."""
    found = {}
    for path, _ in groups_below(cgroup_root()):
        if matched := _POD_GROUP.fullmatch(path.name):
            found[_POD + matched[1].replace("_", "-")] = path
    return found


def _cookie(path: Path) -> int:
    with netns.entered(path):
        return netns.current_cookie()


def _inode(path: Path) -> int:
    try:
        return path.stat().st_ino
    except OSError:
        return 0
