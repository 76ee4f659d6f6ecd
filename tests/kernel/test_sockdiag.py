"""sock_diag(7) tells the same of sockets as they do themselves."""

import os
import socket
import struct
from contextlib import ExitStack

import pytest

from sockhop.kernel.sockdiag import DiagSocket, list_sockets
from sockhop.kernel.sockfilter import PEERS_MAX, any_peer
from sockhop.model import pack_address
from tests.sandbox import Sandbox

pytestmark = pytest.mark.kernel

SO_COOKIE = 57
ESTABLISHED, CLOSE, LISTEN = 1, 7, 10


PROTOCOLS = {socket.SOCK_STREAM: socket.IPPROTO_TCP, socket.SOCK_DGRAM: socket.IPPROTO_UDP}


def expected(own: socket.socket, state: int, cgroup: int) -> DiagSocket:
    nowhere = ("::" if own.family == socket.AF_INET6 else "0.0.0.0", 0)
    peer = own.getpeername() if state == ESTABLISHED else nowhere
    (cookie,) = struct.unpack("=Q", own.getsockopt(socket.SOL_SOCKET, SO_COOKIE, 8))
    return DiagSocket(
        local_address=pack_address(own.getsockname()[0]),
        remote_address=pack_address(peer[0]),
        cookie=cookie,
        inode=os.fstat(own.fileno()).st_ino,
        cgroup=cgroup,
        acknowledged=0,
        received=0,
        interface=0,
        unread=0,
        waiting=0,
        segments=0,
        local_port=own.getsockname()[1],
        remote_port=peer[1],
        family=own.family,
        protocol=PROTOCOLS[own.type],
        state=state,
    )


def test_every_kind_of_socket(sandbox: Sandbox) -> None:
    cgroup = sandbox.cgroup.stat().st_ino
    with ExitStack() as stack:
        known = []
        for family, host in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")):
            server = stack.enter_context(socket.create_server((host, 0), family=family))
            client = stack.enter_context(socket.socket(family, socket.SOCK_STREAM))
            client.connect(server.getsockname())
            accepted = stack.enter_context(server.accept()[0])
            bound = stack.enter_context(socket.socket(family, socket.SOCK_DGRAM))
            bound.bind((host, 0))
            connected = stack.enter_context(socket.socket(family, socket.SOCK_DGRAM))
            connected.connect(bound.getsockname())
            known += [(server, LISTEN), (client, ESTABLISHED), (accepted, ESTABLISHED),
                      (bound, CLOSE), (connected, ESTABLISHED)]  # fmt: skip
        mapped = stack.enter_context(socket.socket(socket.AF_INET6, socket.SOCK_DGRAM))
        mapped.connect(("::ffff:127.0.0.1", 9))
        known.append((mapped, ESTABLISHED))
        wanted = {expected(own, state, cgroup) for own, state in known}
        found = {each for protocol in PROTOCOLS.values() for each in list_sockets(protocol)}
        assert {each._replace(unread=0, waiting=0) for each in found} == wanted


def test_more_sockets_than_one_message_has_room_for(sandbox: Sandbox) -> None:
    with ExitStack() as stack:
        ports = set()
        for _ in range(1500):
            own = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
            own.bind(("127.0.0.1", 0))
            ports.add(own.getsockname()[1])
        assert {each.local_port for each in list_sockets(socket.IPPROTO_UDP)} == ports
        assert not list(list_sockets(socket.IPPROTO_TCP))


@pytest.mark.parametrize("number", [1, 2, 3, 64, 65])
def test_the_kernel_chooses_by_peer(sandbox: Sandbox, number: int) -> None:
    with ExitStack() as stack:
        for host in ("127.0.1.{}", "::ffff:127.0.1.{}"):
            for last in range(1, 70):
                family = socket.AF_INET6 if ":" in host else socket.AF_INET
                own = stack.enter_context(socket.socket(family, socket.SOCK_DGRAM))
                own.connect((host.format(last), 7000 + last % 2))
        six = stack.enter_context(socket.socket(socket.AF_INET6, socket.SOCK_DGRAM))
        six.connect(("::1", 7000))
        wanted = [(pack_address("::1"), 7000)]
        wanted += [(pack_address(f"127.0.1.{last}"), 7000) for last in range(1, number)]
        every = list(list_sockets(socket.IPPROTO_UDP))
        found = list(list_sockets(socket.IPPROTO_UDP, where=any_peer(wanted)))
        meant = [each for each in every if (each.remote_address, each.remote_port) in wanted]
        assert found == (meant if number <= PEERS_MAX else every)
        assert len(meant) == 1 + 2 * ((number - 1) // 2)
