"""Mounts as /proc/self/mountinfo lists them (proc_pid_mountinfo(5))."""

import os
import re
from pathlib import Path
from typing import NamedTuple

__all__ = ["Mount", "filesystem_type", "mounts"]

_MOUNTINFO = Path("/proc/self/mountinfo")


class Mount(NamedTuple):
    """One line of mountinfo: what is mounted (`root` of `type`) and where (`point`)."""

    root: str
    point: Path
    type: str


def mounts(mountinfo: Path | None = None, *, of_type: str = "") -> list[Mount]:
    """Return all mounts of a mount namespace, this process's by default, in mount order.

    *of_type*: only those of this type of filesystem.
    """
    # A path is any bytes; of what ends a line elsewhere only the newline is escaped in it.
    lines = os.fsdecode((mountinfo or _MOUNTINFO).read_bytes()).split("\n")[:-1]
    # No other field holds a space.
    return [_parse(line) for line in lines if not of_type or f" - {of_type} " in line]


def filesystem_type(path: Path) -> str:
    """Return the type of the filesystem that *path* (or its nearest existing parent) is on."""
    path = path.resolve()
    over = [mount for mount in mounts() if path.is_relative_to(mount.point)]
    # Of mounts on the same point the last hides the others; max() keeps the first of equals.
    return max(reversed(over), key=lambda mount: len(mount.point.parts)).type


def _parse(line: str) -> Mount:
    fields, _, filesystem = line.partition(" - ")
    root, point = (_unescape(field) for field in fields.split(" ")[3:5])
    return Mount(root, Path(point), filesystem.split(" ")[0])


def _unescape(field: str) -> str:
    # The kernel writes space, tab, newline and backslash in octal.
    if "\\" not in field:
        return field
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), field)
