"""Splices as sockhop does not: by a sockhash whose keys are addresses and ports.

Cilium up to 1.13 and many examples do; such entries go stale (docs/diagnose.md). Benchmarks compare
with it, the demo shows what comes of it, and tests what they would notice.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sockhop.kernel._libbpf import lib
from sockhop.kernel.cgroups import AttachType, open_cgroup
from sockhop.kernel.objects import BpfObject, object_path
from sockhop.kernel.syscall import check

__all__ = ["vanilla"]


@contextmanager
def vanilla(cgroup: Path) -> Iterator[int]:
    """Run the body while TCP sockets of a cgroup are spliced so; it gets the sockhash's descriptor.

    The kernel detaches the program with the cgroup, where this process is killed.
    """
    with BpfObject(object_path("vanilla")) as programs, open_cgroup(cgroup) as group:
        sockets, pair = programs.map_fd("vanilla_sockets"), programs.program("vanilla_sock_ops")
        message = programs.program("vanilla_message")
        check(lib.bpf_prog_attach(message, sockets, lib.BPF_SK_MSG_VERDICT, 0), "attaching sk_msg")
        check(lib.bpf_prog_attach(pair, group, AttachType.SOCK_OPS, 0), "attaching sock_ops")
        try:
            yield sockets
        finally:
            lib.bpf_prog_detach2(pair, group, AttachType.SOCK_OPS)
            lib.bpf_prog_detach2(message, sockets, lib.BPF_SK_MSG_VERDICT)
