"""Tells when manifests may have changed, with inotify(7).

Watched are the directories on the way to each path, through every symbolic link, so that a
rename over a file, a file that comes later and the `..data` swap of a ConfigMap volume are
seen; and the named files themselves, which may be written under another name. A directory of
manifests takes one watch, and one more for each symbolic link in it. Not seen: a file system
that is mounted over one of the directories.
"""

import ctypes
import os
import stat
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from errno import EACCES, ELOOP, ENOENT, ENOTDIR
from pathlib import Path
from types import TracebackType
from typing import Self

from sockhop.errors import SystemLackError
from sockhop.sources.paths import is_manifest_name

__all__ = ["FileWatcher"]

# include/uapi/linux/inotify.h
_MODIFY, _ATTRIB, _CLOSE_WRITE = 0x2, 0x4, 0x8
_MOVED_FROM, _MOVED_TO, _CREATE, _DELETE = 0x40, 0x80, 0x100, 0x200
_DELETE_SELF, _MOVE_SELF = 0x400, 0x800
_Q_OVERFLOW = 0x4000
_ONLYDIR, _MASK_ADD = 0x0100_0000, 0x2000_0000
_EVENT = struct.Struct("iIII")

_SELF = _DELETE_SELF | _MOVE_SELF
_FILE = _MODIFY | _CLOSE_WRITE | _ATTRIB | _SELF
_DIRECTORY = _ONLYDIR | _CREATE | _DELETE | _MOVED_FROM | _MOVED_TO | _SELF

_LINKS_MAX = 40
"""As the kernel's MAXSYMLINKS."""

_ARM_TRIES = 10
_READS = 64
_READ_SIZE = 65536

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass
class _Watch:
    """Events to ask for, and the names in a directory that they must have to matter.

    `manifests`: the paths, as given, of this directory, if all manifests in it matter.
    An event without a name is about the watched file or directory itself and always matters.
    """

    mask: int = 0
    names: set[str] = field(default_factory=set)
    manifests: set[Path] = field(default_factory=set)

    def add(self, other: "_Watch") -> None:
        """Watch for what *other* watches for, too."""
        self.mask |= other.mask
        self.names |= other.names
        self.manifests |= other.manifests


class FileWatcher:
    """Watches files and directories, be they there yet or not. Close it, or use `with`.

    When fileno() is readable, call changed(). To miss nothing, read the files once after the
    watcher is made, and again whenever changed() says so; take_touched() says which.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        """Raises SystemLackError if the kernel gives no inotify instance or too few watches."""
        self._paths = {path: Path.cwd() / path for path in paths}
        self._touched: set[Path] | None = None
        self._watches: dict[int, _Watch] = {}
        self._fd = int(_libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC))
        if self._fd < 0:
            raise _lack("inotify_init1", ctypes.get_errno(), "max_user_instances")
        try:
            self._arm()
        except SystemLackError:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop watching."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def fileno(self) -> int:
        """Return the descriptor that is readable when something has happened."""
        return self._fd

    def changed(self) -> bool:
        """Take what has happened; return whether a watched file may differ. Never waits.

        Raises SystemLackError if there are too few watches for what is there now; then, too, a
        file may differ.
        """
        touched: set[Path] = set()
        elsewhere = rearm = False
        for number, mask, name in self._events():
            watch = self._watches.get(number)
            if watch and watch.manifests and is_manifest_name(name) and name not in watch.names:
                touched |= {directory / name for directory in watch.manifests}
            elif mask & _Q_OVERFLOW or (watch and (not name or name in watch.names)):
                elsewhere = True
                rearm |= bool(mask & ~(_MODIFY | _CLOSE_WRITE))
        # What has become a link leads elsewhere; those that were links are among the names.
        if any(_is_link(path) for path in touched):
            elsewhere = rearm = True
        if elsewhere:
            self._touched = None
        elif self._touched is not None:
            self._touched |= touched
        if rearm:
            self._arm()
        return elsewhere or bool(touched)

    def take_touched(self) -> frozenset[Path] | None:
        """Return the files that may differ since the last call, None for any (at first, too).

        They are manifests in the directories that are watched, be they there or not.
        """
        touched, self._touched = self._touched, set()
        return None if touched is None else frozenset(touched)

    def _events(self) -> Iterator[tuple[int, int, str]]:
        """Watch number, mask and name of what has happened."""
        for _ in range(_READS):
            try:
                data = os.read(self._fd, _READ_SIZE)
            except BlockingIOError:
                return
            offset = 0
            while offset < len(data):
                number, mask, _, length = _EVENT.unpack_from(data, offset)
                offset += _EVENT.size
                name = data[offset : offset + length].rstrip(b"\0")
                offset += length
                yield number, mask, os.fsdecode(name)

    def _arm(self) -> None:
        """Watch what leads to the paths now. What changes meanwhile is seen by the next try."""
        before: dict[Path, _Watch] = {}
        for _ in range(_ARM_TRIES):
            wanted: dict[Path, _Watch] = {}
            for path, absolute in self._paths.items():
                if directory := _follow(absolute, wanted):
                    _follow_entries(directory, wanted)
                    wanted[directory].manifests.add(path)
            if wanted == before:
                return
            self._watch(wanted)
            before = wanted

    def _watch(self, wanted: dict[Path, _Watch]) -> None:
        watches: dict[int, _Watch] = {}
        for path, watch in wanted.items():
            mask = watch.mask | _MASK_ADD
            number = int(_libc.inotify_add_watch(self._fd, os.fsencode(path), mask))
            if number >= 0:
                # One file or directory can have two paths.
                watches.setdefault(number, _Watch()).add(watch)
            elif (error := ctypes.get_errno()) not in (EACCES, ELOOP, ENOENT, ENOTDIR):
                raise _lack(f"inotify_add_watch on {path}", error, "max_user_watches")
        for number in self._watches.keys() - watches.keys():
            _libc.inotify_rm_watch(self._fd, number)
        self._watches = watches


def _follow(path: Path, wanted: dict[Path, _Watch]) -> Path | None:
    """Add to *wanted* what to watch on the way to an absolute path, as far as it exists.

    Returns the directory that it leads to, None if it leads to none.
    """
    here, names, links = Path("/"), list(reversed(path.parts[1:])), 0
    while names:
        name = names.pop()
        if name == "..":
            here = here.parent
            continue
        _want(wanted, here, _DIRECTORY if names else _DIRECTORY | _FILE).names.add(name)
        entry = here / name
        try:
            mode = entry.lstat().st_mode
            target = entry.readlink() if stat.S_ISLNK(mode) else None
        except (OSError, ValueError):
            return None
        if target:
            links += 1
            if links > _LINKS_MAX:
                return None
            here = Path("/") if target.is_absolute() else here
            names += reversed(target.parts[target.is_absolute() :])
        elif stat.S_ISDIR(mode):
            here = entry
        else:
            _want(wanted, entry, _FILE)
            return None
    return here


def _follow_entries(directory: Path, wanted: dict[Path, _Watch]) -> None:
    """Add a directory's manifests; those that are symbolic links lead elsewhere."""
    _want(wanted, directory, _DIRECTORY | _FILE)
    try:
        with os.scandir(directory) as entries:
            links = [e.name for e in entries if is_manifest_name(e.name) and e.is_symlink()]
    except OSError:
        return
    for name in sorted(links):
        _follow(directory / name, wanted)


def _is_link(path: Path) -> bool:
    try:
        return stat.S_ISLNK(path.lstat().st_mode)
    except (OSError, ValueError):
        return False


def _want(wanted: dict[Path, _Watch], path: Path, mask: int) -> _Watch:
    watch = wanted.setdefault(path, _Watch())
    watch.mask |= mask
    return watch


def _lack(step: str, error: int, limit: str) -> SystemLackError:
    return SystemLackError(
        f"cannot watch manifests: {step}: {os.strerror(error)}",
        hint=f"raise fs.inotify.{limit} with sysctl, or end other programs that watch files",
    )
