"""Who else uses a socket is left alone: MPTCP, kTLS, another tool's sockmap."""

import contextlib
import socket
import struct
from collections.abc import Iterator

import pytest

from sockhop.datapath.splice_records import LaneMode, SpliceReason
from sockhop.kernel._libbpf import lib
from sockhop.kernel.cgroups import AttachType, open_cgroup
from sockhop.kernel.objects import BpfObject, object_path
from tests.splice.stage import Place, Stage
from tests.splice.tcpinfo import tcp_info

pytestmark = pytest.mark.kernel

_MPTCP = 262
_TCP_ULP, _SOL_TLS = 31, 282


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


def _encrypt(one: socket.socket, keys: dict[int, int]) -> None:
    """Set up kTLS 1.3 with AES-GCM-128; *keys*: TLS_TX and TLS_RX to a number for each."""
    one.setsockopt(socket.IPPROTO_TCP, _TCP_ULP, b"tls")
    for direction, number in keys.items():
        # struct tls12_crypto_info_aes_gcm_128 (include/uapi/linux/tls.h)
        secret = struct.pack("=HH", 0x0304, 51) + bytes([number]) * 36
        one.setsockopt(_SOL_TLS, direction, secret)


@pytest.mark.vm  # it needs CONFIG_TLS, which few kernels have built in
@pytest.mark.parametrize("before", [True, False])
def test_ktls(stage: Stage, before: bool) -> None:
    """It is set up before the first bytes, or after some."""
    client, server = stage.connected(Place.LOOPBACK4)
    with client, server:
        for each in (client, server):
            each.settimeout(5)
        if not before:
            talk(client, server)
        _encrypt(client, {1: 1, 2: 2})
        _encrypt(server, {1: 2, 2: 1})
        sent = tcp_info(client).bytes_sent
        talk(client, server)
        assert tcp_info(client).bytes_sent > sent + 3 * len(b"words"), "it is encrypted"
        assert {stage.lane(each) for each in (client, server)} <= {LaneMode.STACK, None}
    assert stage.reasons().keys() <= {SpliceReason.ULP, SpliceReason.UNPAIRED}


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
