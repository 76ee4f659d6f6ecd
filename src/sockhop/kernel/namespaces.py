"""Every network namespace of the node, and the way into it (network_namespaces(7), nsfs)."""

import os
import socket
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import NamedTuple, TypeAlias

from sockhop.errors import InputError, SockhopError
from sockhop.kernel import netns
from sockhop.kernel.mounts import mounts
from sockhop.kernel.syscall import KernelError

__all__ = ["Namespace", "NamespaceGone", "Namespaces", "entered", "mounted_names", "namespace_of"]

_Places: TypeAlias = Callable[[], Iterator[str]]

_PROC = "/proc"
_NAMED = Path("/run/netns")


class Namespace(NamedTuple):
    """A network namespace: inode, cookie, and a path that leads to it for as long as it is held."""

    inode: int
    cookie: int
    path: Path


class NamespaceGone(SockhopError):
    """A namespace is no longer where it was found."""


@contextmanager
def entered(namespace: Namespace) -> Iterator[None]:
    """Run the body inside, this thread only; NamespaceGone where that cannot be."""
    gone = NamespaceGone(f"network namespace {namespace.inode} is not at {namespace.path} any more")
    with ExitStack() as stack:
        try:
            stack.enter_context(netns.entered(namespace.path))
        except InputError:
            raise gone from None
        # A pid or an inode may have been given again.
        if netns.current_cookie() != namespace.cookie:
            raise gone
        yield


@contextmanager
def namespace_of(own: socket.socket) -> Iterator[Namespace]:
    """Yield the namespace of a socket, which may be all that holds it; errors as in netns_of()."""
    with netns.netns_of(own) as path:
        yield Namespace(netns.inode(path), netns.socket_netns_cookie(own), path)


class Namespaces:
    """Finds network namespaces, and remembers where.

    It looks at what threads are in, at mounts in every mount namespace (`ip netns`, Docker and
    containerd keep theirs so), and at open descriptors. One that only a socket holds is not found:
    see :func:`namespace_of`.
    """

    def __init__(self) -> None:
        self._known: dict[int, Namespace] = {}
        self.closed: set[int] = set()
        """Inodes of those that were found the last time, but may not be entered."""

    def all(self, *, quick: bool = False) -> list[Namespace]:
        """Return all namespaces that are there now.

        *quick*: but those that nothing but a descriptor holds. To find these all descriptors of the
        node are looked at, which takes some microseconds for each.
        """
        # A mount stays; a thread that is seen in a namespace may only be having a look at it.
        self._look(
            lambda: False, (_mounted, _of_threads) if quick else (_mounted, _of_threads, _held)
        )
        return list(self._known.values())

    def by_inode(self, wanted: Collection[int]) -> list[Namespace]:
        """Return the namespaces with these inodes, those that can be found."""
        return self._find(lambda each: each.inode, set(wanted))

    def by_cookie(self, wanted: Collection[int]) -> list[Namespace]:
        """Return the namespaces with these cookies, those that can be found."""
        return self._find(lambda each: each.cookie, set(wanted))

    def _find(self, key: Callable[[Namespace], int], wanted: set[int]) -> list[Namespace]:
        def found() -> list[Namespace]:
            return [each for each in self._known.values() if key(each) in wanted]

        if not all(map(_is_there, found())) or len(found()) < len(wanted):
            self._look(lambda: len(found()) == len(wanted))
        return found()

    def _look(self, enough: Callable[[], bool], kinds: Sequence[_Places] = ()) -> None:
        """Look in one kind of place after the other, the quickest first, until it is enough."""
        self._known, self.closed = {}, set()
        for places in kinds or _PLACES:
            for path in places():
                self._note(path)
            if enough():
                return

    def _note(self, place: str) -> None:
        with suppress(OSError, InputError):  # what held it is gone, or it is of another kind
            inode = os.stat(place).st_ino  # noqa: PTH116 (see below)
            if inode in self._known:
                return
            path = Path(place)
            try:
                with netns.entered(path):
                    self._known[inode] = Namespace(inode, netns.current_cookie(), path)
            except KernelError:
                self.closed.add(inode)


def mounted_names() -> dict[int, str]:
    """Return the names by which people know mounted namespaces, by inode.

    That of `ip netns`, else the path in the mount namespace where it is mounted.
    """
    found: dict[int, str] = {}
    for path in map(Path, _mounted()):
        with suppress(OSError):
            point = Path("/", *path.parts[4:])  # behind /proc/PID/root
            name = point.name if point.parent == _NAMED else str(point)
            found.setdefault(netns.inode(path), name)
    return found


def _is_there(namespace: Namespace) -> bool:
    try:
        return netns.inode(namespace.path) == namespace.inode
    except OSError:
        return False


# Text, not Path: the places are thousands, and a policy in force waits for them.


def _processes() -> list[str]:
    return [f"{_PROC}/{name}" for name in os.listdir(_PROC) if name.isdecimal()]


def _of_threads() -> Iterator[str]:
    processes = _processes()
    for process in processes:
        yield f"{process}/ns/net"  # most have one thread, or all in one namespace
    for process in processes:
        with suppress(OSError):
            tasks = os.listdir(f"{process}/task")
            if len(tasks) > 1:
                yield from (f"{process}/task/{task}/ns/net" for task in tasks)


def _mounted() -> Iterator[str]:
    seen = set()
    for process in _processes():
        with suppress(OSError):
            mount_namespace = os.stat(f"{process}/ns/mnt").st_ino  # noqa: PTH116
            if mount_namespace in seen:
                continue
            seen.add(mount_namespace)
            for mount in mounts(Path(process, "mountinfo"), of_type="nsfs"):
                if mount.root.startswith("net:"):
                    yield f"{process}/root{mount.point}"


def _held() -> Iterator[str]:
    for process in _processes():
        with suppress(OSError):
            for number in os.listdir(f"{process}/fd"):
                entry = f"{process}/fd/{number}"
                with suppress(OSError):
                    # "/" where it was opened at a mount that is gone. Others are not looked
                    # at: stat() of a file may wait for a server.
                    if (target := os.readlink(entry)) == "/" or target.startswith("net:["):
                        yield entry


_PLACES: tuple[_Places, ...] = (_of_threads, _mounted, _held)
"""The quickest first."""
