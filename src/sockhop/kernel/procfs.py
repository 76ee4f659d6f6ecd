"""What /proc tells of the processes that hold sockets (proc(5))."""

import errno
import os
import socket
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from sockhop.kernel._libbpf import ffi, lib
from sockhop.kernel.syscall import KernelError

__all__ = [
    "Holder",
    "boot_time",
    "borrowed",
    "command_name",
    "command_of",
    "find_holders",
    "network_namespaces",
    "socket_inode",
    "started_at",
]

_PROC = Path("/proc")
_PIDFD_THREAD = os.O_EXCL


class Holder(NamedTuple):
    """A descriptor of a process. As text: command/pid.

    `thread` is the id of a thread that has descriptors of its own (unshare(CLONE_FILES)), else 0.
    """

    command: str
    pid: int
    fd: int
    thread: int = 0

    def __str__(self) -> str:
        return f"{self.command}/{self.pid}"


def socket_inode(target: str) -> int:
    """Return the inode that the link of a descriptor names, as `socket:[1234]`; 0 if none."""
    return int(target[8:-1]) if target.startswith("socket:[") else 0


def find_holders(inodes: Iterable[int]) -> dict[int, list[Holder]]:
    """Find the descriptors of each socket inode, by looking at those of all processes."""
    wanted, found = set(inodes), defaultdict(list)
    for process in _processes() if wanted else ():
        try:
            with os.scandir(process / "fd") as entries:
                held = [(os.readlink(entry.path), entry.name) for entry in entries]
            command = command_of(int(process.name))
        except OSError:
            continue
        for target, number in held:
            if (inode := socket_inode(target)) in wanted:
                found[inode].append(Holder(command, int(process.name), int(number)))
    return found


def network_namespaces() -> dict[int, Path]:
    """Return the namespaces of all processes, and those that `ip netns` keeps, by inode."""
    paths = [process / "ns/net" for process in _processes()]
    named = Path("/run/netns")
    if named.is_dir():
        paths += named.iterdir()
    found: dict[int, Path] = {}
    for path in paths:
        try:
            found.setdefault(path.stat().st_ino, path)
        except OSError:
            continue
    return found


def boot_time() -> float:
    """Return when CLOCK_BOOTTIME was 0, in Unix seconds."""
    return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)


def command_of(pid: int) -> str:
    """Return the name of a process's program; FileNotFoundError where there is no process."""
    return command_name((_PROC / str(pid) / "comm").read_bytes().removesuffix(b"\n"))


def command_name(comm: bytes) -> str:
    """Return a task's name (TASK_COMM_LEN, padded with NUL or not) as it can be shown.

    Any process can choose its own, from any bytes: what cannot be printed is escaped.
    """
    text = comm.rstrip(b"\0").decode(errors="replace")
    return "".join(each if each.isprintable() else f"\\x{ord(each):02x}" for each in text)


def started_at(pid: int) -> float:
    """Return when a process started, in Unix seconds; FileNotFoundError where there is none."""
    stat = (_PROC / str(pid) / "stat").read_bytes()
    ticks = int(stat.rpartition(b")")[2].split()[19])  # the 22nd field; the 2nd may hold anything
    return boot_time() + ticks / os.sysconf("SC_CLK_TCK")


@contextmanager
def borrowed(holder: Holder) -> Iterator[socket.socket]:
    """Yield a duplicate of another process's socket. Needs CAP_SYS_PTRACE.

    Linux kernel commit 8649c322f75c ("pid: Implement pidfd_getfd syscall") (in v5.6).
    A thread of its own needs kernel commit 64bef697d33b ("pidfd: implement PIDFD_THREAD flag for
    pidfd_open()") (in v6.9). KernelError where it cannot be had, ESRCH or EBADF where it is gone.
    The kernel gives the socket the net_cls and net_prio of this process, if those of cgroup v1 are
    in use.
    """
    try:
        process = os.pidfd_open(holder.thread or holder.pid, _PIDFD_THREAD if holder.thread else 0)
        try:
            fd = lib.sockhop_pidfd_getfd(process, holder.fd)
        finally:
            os.close(process)
    except OSError as error:
        raise KernelError(f"opening process {holder.pid}", error.errno or 0) from None
    if fd < 0:
        raise KernelError(f"duplicating descriptor {holder.fd} of {holder}", ffi.errno)
    try:
        duplicate = socket.socket(fileno=fd)
    except OSError:  # the number is another file's by now
        os.close(fd)
        raise KernelError(f"duplicating descriptor {holder.fd} of {holder}", errno.EBADF) from None
    with duplicate:
        yield duplicate


def _processes() -> Iterator[Path]:
    return (path for path in _PROC.iterdir() if path.name.isdecimal())
