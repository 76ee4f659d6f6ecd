"""Files and directories of manifests: which there are, whether they differ, and their bytes."""

import os
import stat
from typing import NamedTuple

from sockhop.errors import InputError

__all__ = [
    "FILE_MAX",
    "FileStamp",
    "is_manifest_name",
    "list_manifests",
    "look_at",
    "printable",
    "read_bytes",
    "unreadable",
]

FILE_MAX = 64 * 2**20
"""Largest file, in bytes."""

_SUFFIXES = (".yaml", ".yml", ".json")
_READ_SIZE = 65536
_KINDS = {
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


class FileStamp(NamedTuple):
    """What differs when a file does. Times in nanoseconds; `changed` (st_ctime) nobody can set."""

    device: int
    inode: int
    size: int
    modified: int
    changed: int


def is_manifest_name(name: str) -> bool:
    """Whether a directory's file of this name is read."""
    return name.endswith(_SUFFIXES) and not name.startswith(".")


def list_manifests(path: str) -> list[str] | None:
    """Return the names of the manifests in a directory, sorted; None for a file.

    Some may be directories. Raises InputError.
    """
    try:
        if not stat.S_ISDIR(os.stat(path).st_mode):  # noqa: PTH116 (a Path costs as much again)
            return None
        return sorted(filter(is_manifest_name, os.listdir(path)))
    except (OSError, ValueError) as error:
        raise unreadable(path, error) from None


def look_at(path: str) -> FileStamp | None:
    """Return the stamp of a file, None for a directory. Opens nothing.

    Raises InputError for what is no file, FileNotFoundError for what is not there, be it only
    the end of a symbolic link.
    """
    try:
        found = os.stat(path)  # noqa: PTH116 (a Path costs as much again)
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        raise unreadable(path, error) from None
    kind = stat.S_IFMT(found.st_mode)
    if kind == stat.S_IFREG:
        return FileStamp(
            found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns
        )
    if kind == stat.S_IFDIR:
        return None
    raise InputError(
        f"{printable(path)}: found {_KINDS.get(kind, 'something else')}, "
        "expected a file or a directory",
        hint="what a program writes has to be kept in a file first, which can be read again",
    )


def read_bytes(path: str) -> bytes:
    """Return what a file holds. Never waits. Raises InputError."""
    chunks, size = [], 0
    try:
        # A pipe may have taken the file's place since it was looked at.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            while size <= FILE_MAX and (chunk := os.read(descriptor, _READ_SIZE)):
                chunks.append(chunk)
                size += len(chunk)
        finally:
            os.close(descriptor)
    except (OSError, ValueError) as error:
        raise unreadable(path, error) from None
    if size > FILE_MAX:
        raise InputError(
            f"{printable(path)}: found more than {FILE_MAX >> 20} MiB, expected a smaller file"
        )
    return b"".join(chunks)


def unreadable(path: str, error: OSError | ValueError) -> InputError:
    """Return what tells a user that *path* cannot be read."""
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return InputError(f"{printable(path)}: cannot be read: {reason}")


def printable(path: str) -> str:
    """Return a path as it can stand in a line of text."""
    return path if path.isprintable() else repr(path)
