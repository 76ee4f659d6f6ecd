"""The cgroup2 hierarchy and the programs attached to its groups (kernel/bpf/cgroup.c)."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from enum import IntEnum
from pathlib import Path
from typing import NamedTuple

from sockhop.errors import InputError, SystemLackError
from sockhop.kernel._libbpf import ffi, lib
from sockhop.kernel.mounts import filesystem_type, mounts
from sockhop.kernel.syscall import KernelError

__all__ = [
    "GROUPS_MAX",
    "AttachType",
    "Attached",
    "attached_programs",
    "cgroup_id",
    "cgroup_path",
    "cgroup_root",
    "cgroups_above",
    "effective_programs",
    "groups_above",
    "groups_below",
    "open_cgroup",
    "own_cgroup",
]

GROUPS_MAX = 10_000
"""How many cgroups a walk looks at at most; a busy Kubernetes node has about 1,000."""


class AttachType(IntEnum):
    """Where on a cgroup a program runs (enum bpf_attach_type), by its section name."""

    INGRESS = lib.BPF_CGROUP_INET_INGRESS
    EGRESS = lib.BPF_CGROUP_INET_EGRESS
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
    SOCK_CREATE = lib.BPF_CGROUP_INET_SOCK_CREATE
    SOCK_RELEASE = lib.BPF_CGROUP_INET_SOCK_RELEASE
    SOCK_OPS = lib.BPF_CGROUP_SOCK_OPS

    @property
    def hook(self) -> str:
        """The field's name of the hook: `connect4`."""
        return self.name.lower()


def cgroup_root() -> Path:
    """Return where the cgroup2 hierarchy is mounted; SystemLackError where it is not."""
    found = [mount.point for mount in mounts(of_type="cgroup2")]
    if not found:
        raise SystemLackError(
            "no cgroup2 hierarchy is mounted",
            hint="mount one with `mount -t cgroup2 none /sys/fs/cgroup`; where `ip netns exec` "
            "hides it, use `nsenter --net=/run/netns/NAME`",
        )
    return found[0]


def own_cgroup() -> Path:
    """Return the cgroup of this process, in which the sockets are that it makes (cgroups(7))."""
    lines = Path("/proc/self/cgroup").read_text().splitlines()
    inside = next((line[3:] for line in lines if line.startswith("0::")), "/")
    return (cgroup_root() / inside.lstrip("/")).resolve()


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


def cgroup_path(any_cgroup: int, number: int) -> Path | None:
    """Return where the cgroup with the id *number* is; None if it is gone.

    *any_cgroup* is a descriptor in the same hierarchy. The id is what a link tells, and the
    directory's inode number. KernelError without CAP_DAC_READ_SEARCH.
    """
    fd = lib.sockhop_open_cgroup(any_cgroup, number)
    if fd < 0:
        if ffi.errno in (errno.ESTALE, errno.ENOENT):
            return None
        raise KernelError(f"finding the cgroup with the id {number}", ffi.errno)
    try:
        return Path(os.readlink(f"/proc/self/fd/{fd}"))
    finally:
        os.close(fd)


def cgroups_above(number: int) -> Iterator[int]:
    """Yield the ids of the cgroup with the id *number* and of those above it, in this order.

    None where it is gone. Nothing is looked up before the first one is asked for.
    """
    if found := _find_group(number):
        with suppress(OSError):
            yield from [group.stat().st_ino for group in (found, *groups_above(found))]


def _find_group(number: int) -> Path | None:
    top = cgroup_root()
    with open_cgroup(top) as root, suppress(KernelError):
        return cgroup_path(root, number)
    # Without CAP_DAC_READ_SEARCH, which the unit does not have.
    return next((path for path, fd in groups_below(top) if os.fstat(fd).st_ino == number), None)


def groups_above(group: Path) -> Iterator[Path]:
    """Yield the cgroups above *group*, the nearest first, as far as they are visible here."""
    root = cgroup_root()
    for above in group.resolve().parents:
        if not above.is_relative_to(root):
            return
        yield above


def groups_below(top: Path, limit: int = GROUPS_MAX) -> Iterator[tuple[Path, int]]:
    """Yield *top* and the cgroups below it, parents first, each with an open descriptor.

    No more than *limit*; those that go meanwhile are passed over. The descriptor is closed when
    the next one is asked for.
    """
    waiting, found = [top], 0
    while waiting and found < limit:
        group = waiting.pop()
        try:
            fd = os.open(group, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError:
            continue
        found += 1
        try:
            with os.scandir(group) as entries:
                waiting += [Path(e.path) for e in entries if e.is_dir(follow_symlinks=False)]
            yield group, fd
        except FileNotFoundError:
            continue
        finally:
            os.close(fd)


class Attached(NamedTuple):
    """The programs at one hook of a cgroup itself, in the order they run.

    `flags`: BPF_F_ALLOW_MULTI where others may join (and with every link), BPF_F_ALLOW_OVERRIDE
    where cgroups below may have their own instead, 0 where neither.
    """

    programs: tuple[int, ...] = ()
    flags: int = 0

    @property
    def is_shared(self) -> bool:
        """Whether another program may be attached beside these."""
        return not self.programs or bool(self.flags & lib.BPF_F_ALLOW_MULTI)

    @property
    def forbids_below(self) -> bool:
        """Whether no cgroup below may have a program of its own at this hook."""
        return not self.is_shared and not self.flags & lib.BPF_F_ALLOW_OVERRIDE


def attached_programs(cgroup: int, attach_type: AttachType) -> Attached:
    """Return what is attached to the cgroup itself.

    EINVAL (the kernel does not know the type) and EBADF (cgroup v1) mean nothing. KernelError
    without CAP_NET_ADMIN.
    """
    return _query(cgroup, attach_type, 0)


def effective_programs(cgroup: int, attach_type: AttachType) -> tuple[int, ...]:
    """Return the ids of the programs that run for the cgroup's processes, in their order.

    They come from the cgroup and those above it. Errors as in :func:`attached_programs`.
    """
    return _query(cgroup, attach_type, lib.BPF_F_QUERY_EFFECTIVE).programs


def _query(cgroup: int, attach_type: AttachType, how: int) -> Attached:
    room, flags, n = 64, ffi.new("__u32 *"), ffi.new("__u32 *")
    while True:
        ids, n[0] = ffi.new("__u32[]", room), room
        result = lib.bpf_prog_query(cgroup, attach_type, how, flags, ids, n)
        if result != -errno.ENOSPC or n[0] <= room:
            break
        room = n[0]
    if -result in (errno.EINVAL, errno.EBADF):
        return Attached()
    if result < 0:
        raise KernelError(f"querying the {attach_type.hook} programs of a cgroup", -result)
    return Attached(tuple(ids[i] for i in range(n[0])), flags[0])
