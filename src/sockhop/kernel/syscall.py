"""Calls into libbpf and the kernel, with errors that name the object, the step and the remedy."""

import errno
import os

from sockhop.errors import SystemLackError
from sockhop.kernel._libbpf import ffi, lib

__all__ = ["KernelError", "check", "grace_period", "last_log"]


class KernelError(SystemLackError):
    """A system call failed: `errno` says how, the message what was being done to which object."""

    def __init__(self, doing: str, number: int, *, hint: str = "") -> None:
        self.errno = number
        name = errno.errorcode.get(number, str(number))
        super().__init__(f"{doing}: {os.strerror(number)} ({name})", hint=hint or _hint(number))


def _hint(number: int) -> str:
    if number in (errno.EPERM, errno.EACCES):
        return "run as root, or with CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON"
    if number == errno.ENOSYS:
        return "this kernel is built without bpf(2) (CONFIG_BPF_SYSCALL)"
    return ""


def check(result: int, doing: str) -> int:
    """Return *result* of a libbpf call; a negative one (-errno) becomes a KernelError."""
    if result < 0:
        raise KernelError(doing, -int(result))
    return int(result)


def last_log(lines: int = 12) -> str:
    """Return the last lines of what libbpf and the verifier said since the log was reset."""
    text = str(ffi.string(lib.sockhop_log()).decode(errors="replace"))
    return "\n".join(text.splitlines()[-lines:])


def grace_period() -> None:
    """Wait until every BPF program that was running when this was called has ended.

    The kernel calls synchronize_rcu() when a map in a map is changed, and cgroup programs run in
    an RCU read-side section (kernel/bpf/cgroup.c). Linux kernel commit 1ae80cf31938 ("bpf: wait for
    running BPF programs when updating map-in-map") (in v4.20). membarrier(2) does the same only
    with several CPUs, and not with nohz_full (kernel/sched/membarrier.c).
    """
    check(lib.sockhop_grace_period(), "waiting for a grace period")
