"""Lists and ends sockets, as ss does: NETLINK_SOCK_DIAG (sock_diag(7), net/ipv4/inet_diag.c)."""

import errno
import socket
import struct
import sys
from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple, Protocol

from sockhop.kernel.syscall import KernelError

__all__ = ["ALL_STATES", "DiagSocket", "Identity", "destroy_sockets", "list_sockets"]

ALL_STATES = 0xFFF << 1
"""All states of include/net/tcp_states.h, one bit each."""

_NETLINK_SOCK_DIAG = 4
_SOCK_DIAG_BY_FAMILY, _SOCK_DESTROY = 20, 21
_NLM_F_REQUEST, _NLM_F_ACK, _NLM_F_DUMP = 0x1, 0x4, 0x300
_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_EXT_INFO = 1 << 2 - 1  # INET_DIAG_INFO
_REQ_BYTECODE = 1  # INET_DIAG_REQ_BYTECODE
_INFO = 2  # INET_DIAG_INFO
# Linux kernel commit 6e3a401fc8af ("inet_diag: add cgroup id attribute") (in v5.8).
_CGROUP_ID = 21
_MAPPED = bytes(10) + b"\xff\xff"
_BATCH = 64
"""So many acknowledgements fit into any receive buffer."""

_HEADER = struct.Struct("=IHHII")  # struct nlmsghdr: length, type, flags, sequence, port
# struct inet_diag_req_v2 (inet_diag_req_raw): family, protocol, ext, raw protocol, states;
# struct inet_diag_sockid: ports and addresses (network order), interface, cookie
_REQUEST = struct.Struct("=BBBBI2s2s16s16sIQ")
# struct inet_diag_msg: family, state; sockid; queues; inode
_ANSWER = struct.Struct("=BB2x2s2s16s16sIQ4xII4xI")
_ATTRIBUTE = struct.Struct("=HH")  # struct nlattr: length, type
# struct tcp_info: tcpi_bytes_acked, tcpi_bytes_received, tcpi_segs_in
_PROGRESS = struct.Struct("=120xQQ4xI")


class DiagSocket(NamedTuple):
    """A socket. Addresses are 16 bytes, IPv4 mapped; `inode` is 0 where no process holds it.

    `state` is a number of include/net/tcp_states.h, for UDP too; `interface` the one that the
    socket is bound to, 0 for none; `cgroup` the id of the cgroup in which the socket was made, 0
    where the kernel does not tell. `unread` and `waiting` are bytes in its queues: not read by
    the program, not acknowledged by the peer. TCP's progress, 0 if it was not asked for: bytes
    that the peer has acknowledged, bytes received, segments received, pure acknowledgements too.

    Of a raw socket, `local_port` is the protocol (net/ipv4/raw_diag.c).
    """

    local_address: bytes
    remote_address: bytes
    cookie: int
    inode: int
    cgroup: int
    acknowledged: int
    received: int
    interface: int
    unread: int
    waiting: int
    segments: int
    local_port: int
    remote_port: int
    family: int
    protocol: int
    state: int


class Identity(Protocol):
    """What the kernel needs to know one socket from all others of its network namespace."""

    @property
    def protocol(self) -> int: ...
    @property
    def family(self) -> int: ...
    @property
    def local_address(self) -> bytes: ...
    @property
    def local_port(self) -> int: ...
    @property
    def remote_address(self) -> bytes: ...
    @property
    def remote_port(self) -> int: ...
    @property
    def interface(self) -> int: ...
    @property
    def cookie(self) -> int: ...


def list_sockets(
    protocol: int,
    *,
    states: int = ALL_STATES,
    where: bytes = b"",
    progress: bool = False,
) -> Iterator[DiagSocket]:
    """Yield the IPv4 and IPv6 sockets of *protocol* in this thread's network namespace.

    *where*: bytecode by which the kernel chooses (kernel/sockfilter.py); *progress*: ask for TCP's.

    Sockets that come or go meanwhile may be missed. Of TCP, the kernel's tables have only those
    that listen, connect or are connected. KernelError where the kernel has no such diagnosis.
    """
    extra = _attribute(_REQ_BYTECODE, where) if where else b""
    with _opened() as netlink:
        for family in (socket.AF_INET, socket.AF_INET6):
            head = _REQUEST.pack(
                family, protocol, _EXT_INFO * progress, 0, states, *_NOBODY
            )  # fmt: skip
            size = _HEADER.size + len(head) + len(extra)
            flags = _NLM_F_REQUEST | _NLM_F_DUMP
            netlink.send(_HEADER.pack(size, _SOCK_DIAG_BY_FAMILY, flags, 0, 0) + head + extra)
            for data in _answers(netlink):
                yield _decode(protocol, data)


def destroy_sockets(sockets: Sequence[Identity]) -> list[int]:
    """End sockets of this thread's network namespace (SOCK_DESTROY); return an errno for each.

    0: its program finds ECONNABORTED. ENOENT or ESTALE: no socket has these ends and this cookie
    any more. The kernel finds a UDP socket also if it has lost its peer meanwhile, see udp_diag.c.
    """
    results: list[int] = []
    with _opened() as netlink:
        for first in range(0, len(sockets), _BATCH):
            batch = sockets[first : first + _BATCH]
            netlink.send(b"".join(_destroy(each, n) for n, each in enumerate(batch)))
            answers: dict[int, int] = {}
            while len(answers) < len(batch):
                answers.update(_acknowledgements(netlink.recv(1 << 16)))
            results += (answers[n] for n in range(len(batch)))
    return results


_NOBODY = (b"", b"", b"", b"", 0, 0)


def _opened() -> socket.socket:
    return socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_SOCK_DIAG)


def _attribute(kind: int, data: bytes) -> bytes:
    size = _ATTRIBUTE.size + len(data)
    return _ATTRIBUTE.pack(size, kind) + data + bytes(-size % 4)


def _destroy(each: Identity, number: int) -> bytes:
    raw = each.local_port if each.protocol == socket.IPPROTO_RAW else 0
    four = each.family == socket.AF_INET
    request = _REQUEST.pack(
        each.family,
        each.protocol,
        0,
        raw,
        ALL_STATES,
        each.local_port.to_bytes(2, "big"),
        each.remote_port.to_bytes(2, "big"),
        each.local_address[12:] if four else each.local_address,
        each.remote_address[12:] if four else each.remote_address,
        each.interface,
        each.cookie,
    )
    size, flags = _HEADER.size + len(request), _NLM_F_REQUEST | _NLM_F_ACK
    return _HEADER.pack(size, _SOCK_DESTROY, flags, number, 0) + request


def _acknowledgements(data: bytes) -> Iterator[tuple[int, int]]:
    at = 0
    while at < len(data):
        size, _, _, number, _ = _HEADER.unpack_from(data, at)
        (result,) = struct.unpack_from("=i", data, at + _HEADER.size)
        yield number, -result
        at += size + -size % 4


def _answers(netlink: socket.socket) -> Iterator[bytes]:
    while True:
        data = netlink.recv(1 << 16)
        at = 0
        while at < len(data):
            size, kind, *_ = _HEADER.unpack_from(data, at)
            if kind in (_NLMSG_DONE, _NLMSG_ERROR):
                # A dump that fails, as one of a protocol without diagnosis, may say so at its end.
                (number,) = struct.unpack_from("=i", data, at + _HEADER.size)
                if number:
                    hint = "load the kernel's modules tcp_diag, udp_diag and raw_diag"
                    hint = hint if -number == errno.ENOENT else ""
                    raise KernelError("listing sockets with sock_diag(7)", -number, hint=hint)
                return
            yield data[at + _HEADER.size : at + size]
            at += size + -size % 4


def _decode(protocol: int, data: bytes) -> DiagSocket:
    (family, state, local_port, remote_port, local, remote, interface, cookie, unread, waiting,
     inode) = _ANSWER.unpack_from(data)  # fmt: skip
    found = _attributes(data, _ANSWER.size, {_INFO, _CGROUP_ID})
    info = found.get(_INFO, b"").ljust(_PROGRESS.size, b"\0")
    acknowledged, received, segments = _PROGRESS.unpack_from(info)
    return DiagSocket(
        _address(family, local),
        _address(family, remote),
        cookie,
        inode,
        int.from_bytes(found.get(_CGROUP_ID, b""), sys.byteorder),
        acknowledged,
        received,
        interface,
        unread,
        waiting,
        segments,
        int.from_bytes(local_port, "big"),
        int.from_bytes(remote_port, "big"),
        family,
        protocol,
        state,
    )


def _attributes(data: bytes, at: int, wanted: Collection[int]) -> dict[int, bytes]:
    found: dict[int, bytes] = {}
    while at + _ATTRIBUTE.size <= len(data):
        size, kind = _ATTRIBUTE.unpack_from(data, at)
        if kind in wanted:
            found[kind] = data[at + _ATTRIBUTE.size : at + size]
        at += max(size + -size % 4, _ATTRIBUTE.size)
    return found


def _address(family: int, data: bytes) -> bytes:
    return _MAPPED + data[:4] if family == socket.AF_INET else data
