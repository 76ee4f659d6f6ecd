"""Desired state from manifest files: the compact form and Kubernetes objects, together."""

import gc
import os
import time
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from errno import EISDIR
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import msgspec

from sockhop.errors import InputError
from sockhop.model import Desired
from sockhop.sources.merge import Merger
from sockhop.sources.parts import Part, read_part
from sockhop.sources.paths import (
    FileStamp,
    is_manifest_name,
    list_manifests,
    look_at,
    printable,
    unreadable,
)

__all__ = ["FileSource", "Loaded", "load"]

_TICK = 20_000_000
"""Nanoseconds in which a file may change twice and keep its times: two jiffies at most
(Documentation/filesystems/multigrain-ts.rst)."""

_COARSE_TICK = 2_000_000_000
"""The same where a file system has whole seconds only, or every other one (FAT)."""


class Loaded(msgspec.Struct, frozen=True):
    """What files say, and, a line each, `FILE: …: what is ignored and why`."""

    desired: Desired
    warnings: tuple[str, ...]


class _Known(NamedTuple):
    """A file as read; without a stamp it is read again at the next look."""

    stamp: FileStamp | None
    part: Part


class FileSource:
    """Manifests in files and directories, read again only where they differ.

    It keeps what each file says, not the files' text: about as much as the services themselves.
    """

    def __init__(self, paths: Sequence[Path], *, node_name: str = "") -> None:
        """*node_name*: the Kubernetes node whose endpoints `internalTrafficPolicy: Local` keeps.

        Without it they all stay, with a warning. Raises InputError where there are no paths.
        """
        if not paths:
            raise InputError("no file or directory of manifests is given")
        self._paths = [os.fspath(path) for path in paths]
        self._merger = Merger(node_name)
        self._files: dict[str, list[str]] = {}
        self._directories: set[str] = set()
        self._known: dict[str, _Known] = {}
        self._parts: list[Part] = []
        self._loaded: Loaded | None = None

    def load(self, touched: Iterable[Path] | None = None) -> Loaded:
        """Return what the files say now.

        *touched*: the files that may differ since the last load, as `FileWatcher.take_touched`
        has them; None for any of them.

        Services are sorted by name; frontends and backends stay in the order of the manifest.
        Frontends are unique: of two Kubernetes Services the older keeps one that both have.
        A service that is as it was at the last load is the same object.
        Raises InputError, which names file, line, document and field, for anything that cannot be
        read or believed; nothing is ever read in part.
        """
        with _collector_paused():
            # Until this has gone well, the next load has to look everywhere.
            loaded, self._loaded = self._loaded, None
            if touched is None or loaded is None or not self._look_at(touched):
                self._look_everywhere()
            files = dict.fromkeys(chain.from_iterable(self._files.values()))
            parts = [self._known[file].part for file in files]
            if loaded is None or parts != self._parts:
                desired, warnings = self._merger.merge(parts)
                loaded, self._parts = Loaded(desired, warnings), parts
            self._loaded = loaded
            return loaded

    def _look_everywhere(self) -> None:
        """Bring all that is known up to date, and forget what is gone."""
        self._files, self._directories = {}, set()
        for path in self._paths:
            names = list_manifests(path)
            if names is None:
                self._files[path] = [path]
            else:
                self._files[path] = [_join(path, name) for name in names]
                self._directories.add(path)
        files = set(chain.from_iterable(self._files.values()))
        self._known = {file: known for file, known in self._known.items() if file in files}
        for path, found in self._files.items():
            self._files[path] = [file for file in found if self._refresh(file, file != path)]
            if not self._files[path]:
                raise InputError(
                    f"{printable(path)}: found no manifest in the directory, "
                    "expected files named *.yaml, *.yml or *.json"
                )

    def _look_at(self, touched: Iterable[Path]) -> bool:
        """The same for a few manifests of directories; return whether that was all of it.

        It was not where one has a fault: of several the first, in order, is to be told.
        """
        for file in map(os.fspath, touched):
            directory, name = os.path.split(file)
            directory = directory or "."
            if directory not in self._directories or not is_manifest_name(name):
                return False
            found = self._files[directory]
            index = bisect_left(found, file)
            was_there = found[index : index + 1] == [file]
            try:
                is_there = self._refresh(file, listed=True)
            except InputError:
                return False
            if is_there and not was_there:
                found.insert(index, file)
            elif was_there and not is_there:
                del found[index]
        return all(self._files.values())

    def _refresh(self, file: str, listed: bool) -> bool:
        """Read a file if it differs; return whether there is one.

        *listed*: it is one of a directory, so that none is no error.
        """
        now = time.time_ns()
        try:
            stamp = look_at(file)
            if stamp is None and not listed:
                raise IsADirectoryError(EISDIR, os.strerror(EISDIR))
        except OSError as error:
            # A link that leads nowhere is an error, a file that has just gone is none.
            if not listed or os.path.lexists(file):
                raise unreadable(file, error) from None
            stamp = None
        known = self._known.get(file)
        if stamp is None:
            self._known.pop(file, None)
        elif known is None or known.stamp != stamp:
            part = read_part(file, known.part if known else None)
            self._known[file] = _Known(None if _is_fresh(stamp, now) else stamp, part)
        return stamp is not None


def load(paths: Sequence[Path], *, node_name: str = "") -> Loaded:
    """Read manifests from files and directories, once (see :class:`FileSource`)."""
    return FileSource(paths, node_name=node_name).load()


def _is_fresh(stamp: FileStamp, now: int) -> bool:
    """Whether a file could change from *now* on and have the same times again."""
    tick = _TICK if stamp.changed % 1_000_000_000 else _COARSE_TICK
    return abs(now - stamp.changed) < tick


def _join(directory: str, name: str) -> str:
    """As `Path(directory, name)` writes it."""
    return name if directory == "." else os.path.join(directory, name)  # noqa: PTH118


@contextmanager
def _collector_paused() -> Iterator[None]:
    """Without the garbage collector, which takes half of the time and finds no cycle here."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
