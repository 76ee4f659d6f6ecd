"""The sockhash by tuple, to show what the tests would notice."""

from collections.abc import Iterator
from contextlib import contextmanager

from sockhop.kernel._libbpf import lib
from sockhop.kernel.cgroups import AttachType, open_cgroup
from sockhop.kernel.objects import BpfObject, object_path
from tests.splice.stage import Stage

__all__ = ["vanilla"]


@contextmanager
def vanilla(stage: Stage) -> Iterator[int]:
    """Run the body with the stage's sockets in a sockhash by tuple; it gets its descriptor."""
    with (
        BpfObject(object_path("vanilla")) as programs,
        open_cgroup(stage.sandbox.cgroup) as cgroup,
    ):
        sockets, pair = programs.map_fd("vanilla_sockets"), programs.program("vanilla_sock_ops")
        message = programs.program("vanilla_message")
        assert lib.bpf_prog_attach(message, sockets, lib.BPF_SK_MSG_VERDICT, 0) == 0
        assert lib.bpf_prog_attach(pair, cgroup, AttachType.SOCK_OPS, 0) == 0
        try:
            yield sockets
        finally:
            lib.bpf_prog_detach2(pair, cgroup, AttachType.SOCK_OPS)
            lib.bpf_prog_detach2(message, sockets, lib.BPF_SK_MSG_VERDICT)
