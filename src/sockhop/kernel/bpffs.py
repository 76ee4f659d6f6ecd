"""A directory on a BPF filesystem, where pins live, and the lock on it."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sockhop.errors import SystemLackError
from sockhop.kernel.mounts import filesystem_type

__all__ = ["Locked", "lock_directory", "one_at_a_time", "require_bpffs"]


class Locked(SystemLackError):
    """Another process holds the lock on the directory."""


def require_bpffs(directory: Path) -> None:
    """Raise SystemLackError unless *directory*, which need not exist yet, is on a bpffs."""
    kind = filesystem_type(directory)
    if kind != "bpf":
        raise SystemLackError(
            f"{directory}: this is on {kind}, pins need a BPF filesystem",
            hint="mount one with `mount -t bpf bpf /sys/fs/bpf`, "
            "or name a directory on one with --bpffs (SOCKHOP_BPFFS)",
        )


@contextmanager
def lock_directory(directory: Path) -> Iterator[None]:
    """Make *directory* (0700) on a bpffs and hold its lock, so that one process writes there.

    The kernel drops the lock (flock(2)) with the process, however it ends.
    """
    require_bpffs(directory)
    try:
        directory.mkdir(mode=0o700, exist_ok=True)
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise SystemLackError(
            f"{directory}: {error.strerror}", hint="run as root, or name another with --bpffs"
        ) from None
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Locked(
                f"{directory}: another sockhop process is working here",
                hint="stop it first (systemctl stop sockhop), or give this one its own --bpffs",
            ) from None
        yield
    finally:
        os.close(fd)


@contextmanager
def one_at_a_time(directory: Path) -> Iterator[None]:
    """Run the body while no other process does so with the same *directory*; wait if need be."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)
