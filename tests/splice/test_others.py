"""Who else uses a socket is left alone: MPTCP, another tool's sockmap."""

import contextlib
import socket
from collections.abc import Iterator

import pytest

from sockhop.datapath.splice_records import SpliceReason
from sockhop.kernel._libbpf import lib
from sockhop.kernel.cgroups import AttachType, open_cgroup
from sockhop.kernel.objects import BpfObject, object_path
from tests.splice.stage import Place, Stage

pytestmark = pytest.mark.kernel

_MPTCP = 262


@pytest.fixture
def stage() -> Iterator[Stage]:
    with Stage() as made:
        yield made


def talk(client: socket.socket, server: socket.socket) -> None:
    for one, other in ((client, server), (server, client)):
        for _ in range(3):
            one.sendall(b"words")
            assert other.recv(100) == b"words"


def _mptcp() -> socket.socket:
    try:
        return socket.socket(socket.AF_INET, socket.SOCK_STREAM, _MPTCP)
    except OSError as error:
        pytest.skip(f"socket(IPPROTO_MPTCP): {error}")


@pytest.mark.parametrize("both", [True, False])
def test_mptcp(stage: Stage, both: bool) -> None:
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(_mptcp() if both else socket.socket())
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        client = stack.enter_context(_mptcp())
        client.connect(listener.getsockname())
        server = stack.enter_context(listener.accept()[0])
        talk(client, server)
        assert not stage.entries()
    assert stage.reasons().keys() <= {SpliceReason.ULP, SpliceReason.KERNEL}
    assert stage.counters().pairs == 0


def test_another_sockmap(stage: Stage) -> None:
    """Its program runs first, and it alone splices."""
    with (
        BpfObject(object_path("vanilla")) as programs,
        open_cgroup(stage.sandbox.cgroup) as cgroup,
    ):
        sockets, pair = programs.map_fd("vanilla_sockets"), programs.program("vanilla_sock_ops")
        message = programs.program("vanilla_message")
        stage.detach()
        assert lib.bpf_prog_attach(message, sockets, lib.BPF_SK_MSG_VERDICT, 0) == 0
        assert lib.bpf_prog_attach(pair, cgroup, AttachType.SOCK_OPS, lib.BPF_F_ALLOW_MULTI) == 0
        try:
            stage.splicer.attach(cgroup)
            client, server = stage.connected(Place.LOOPBACK4)
            with client, server:
                talk(client, server)
                assert not stage.entries()
            assert stage.reasons()[SpliceReason.BUSY] >= 1
            assert stage.counters().pairs == 0
        finally:
            lib.bpf_prog_detach2(pair, cgroup, AttachType.SOCK_OPS)
