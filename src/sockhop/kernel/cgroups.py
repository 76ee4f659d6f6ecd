"""The cgroup2 hierarchy and the programs attached to its groups (kernel/bpf/cgroup.c)."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum
from pathlib import Path

from sockhop.errors import InputError, SystemLackError
from sockhop.kernel._libbpf import ffi, lib
from sockhop.kernel.mounts import filesystem_type, mounts
from sockhop.kernel.syscall import KernelError

__all__ = ["AttachType", "attached_programs", "cgroup_id", "cgroup_root", "open_cgroup"]


class AttachType(IntEnum):
    """Where on a cgroup a program runs (enum bpf_attach_type), by its section name."""

    CONNECT4 = lib.BPF_CGROUP_INET4_CONNECT
    CONNECT6 = lib.BPF_CGROUP_INET6_CONNECT
    SENDMSG4 = lib.BPF_CGROUP_UDP4_SENDMSG
    SENDMSG6 = lib.BPF_CGROUP_UDP6_SENDMSG
    RECVMSG4 = lib.BPF_CGROUP_UDP4_RECVMSG
    RECVMSG6 = lib.BPF_CGROUP_UDP6_RECVMSG
    GETPEERNAME4 = lib.BPF_CGROUP_INET4_GETPEERNAME
    GETPEERNAME6 = lib.BPF_CGROUP_INET6_GETPEERNAME
    BIND4 = lib.BPF_CGROUP_INET4_BIND
    BIND6 = lib.BPF_CGROUP_INET6_BIND
    POST_BIND4 = lib.BPF_CGROUP_INET4_POST_BIND
    POST_BIND6 = lib.BPF_CGROUP_INET6_POST_BIND
    SOCK_RELEASE = lib.BPF_CGROUP_INET_SOCK_RELEASE

    @property
    def hook(self) -> str:
        """The field's name of the hook: `connect4`."""
        return self.name.lower()


def cgroup_root() -> Path:
    """Return where the cgroup2 hierarchy is mounted; SystemLackError where it is not."""
    found = [mount.point for mount in mounts() if mount.type == "cgroup2"]
    if not found:
        raise SystemLackError(
            "no cgroup2 hierarchy is mounted",
            hint="mount one with `mount -t cgroup2 none /sys/fs/cgroup`",
        )
    return found[0]


def cgroup_id(path: Path) -> int:
    """Return the id of the cgroup directory *path*: its inode (fs/kernfs, 64 bits)."""
    if not path.is_dir():
        raise InputError(
            f"{path}: there is no such cgroup", hint=f"the hierarchy is at {cgroup_root()}"
        )
    return path.stat().st_ino


@contextmanager
def open_cgroup(path: Path) -> Iterator[int]:
    """Yield a descriptor of the cgroup directory *path*, which must be cgroup2."""
    cgroup_id(path)
    kind = filesystem_type(path)
    if kind != "cgroup2":
        raise SystemLackError(
            f"{path}: this is {'a cgroup v1' if kind == 'cgroup' else f'on {kind}'}, "
            "programs attach to cgroup2 only",
            hint=f"name a group under {cgroup_root()} with --cgroup (SOCKHOP_CGROUP)",
        )
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def attached_programs(cgroup: int, attach_type: AttachType) -> tuple[int, ...]:
    """Return the ids of the programs attached to the cgroup itself, in the order they run.

    EINVAL (the kernel does not know the type) and EBADF (cgroup v1) mean none.
    """
    room = 64  # BPF_CGROUP_MAX_PROGS (include/linux/bpf-cgroup.h)
    ids, n = ffi.new("__u32[]", room), ffi.new("__u32 *", room)
    result = lib.bpf_prog_query(cgroup, attach_type, 0, ffi.NULL, ids, n)
    if -result in (errno.EINVAL, errno.EBADF):
        return ()
    if result < 0:
        raise KernelError(f"querying the {attach_type.hook} programs of a cgroup", -result)
    return tuple(ids[i] for i in range(n[0]))
