"""Lists sockets with NETLINK_SOCK_DIAG, as ss does (sock_diag(7), net/ipv4/inet_diag.c)."""

import errno
import socket
import struct
import sys
from collections.abc import Iterator
from typing import NamedTuple

from sockhop.kernel.syscall import KernelError

__all__ = ["DiagSocket", "list_sockets"]

_NETLINK_SOCK_DIAG = 4
_SOCK_DIAG_BY_FAMILY = 20
_NLM_F_REQUEST, _NLM_F_DUMP = 0x1, 0x300
_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_ALL_STATES = 0xFFFFFFFF
# Linux kernel commit 6e3a401fc8af ("inet_diag: add cgroup id attribute") (in v5.8).
_INET_DIAG_CGROUP_ID = 21
_MAPPED = bytes(10) + b"\xff\xff"

_HEADER = struct.Struct("=IHHII")  # struct nlmsghdr: length, type, flags, sequence, port
# struct inet_diag_req_v2 with an empty struct inet_diag_sockid
_REQUEST = struct.Struct("=BBBxI48x")
# struct inet_diag_msg: family, state; ports (network order), addresses; cookie; inode
_ANSWER = struct.Struct("=BB2x2s2s16s16s4xQ16xI")
_ATTRIBUTE = struct.Struct("=HH")  # struct nlattr: length, type


class DiagSocket(NamedTuple):
    """A socket. Addresses are 16 bytes, IPv4 mapped; `inode` is 0 where no process holds it.

    `state` is a number of include/net/tcp_states.h, for UDP too; `cgroup` the id of the cgroup
    in which the socket was made, 0 where the kernel does not tell.
    """

    protocol: int
    family: int
    state: int
    local_address: bytes
    local_port: int
    remote_address: bytes
    remote_port: int
    cookie: int
    inode: int
    cgroup: int


def list_sockets(protocol: int) -> Iterator[DiagSocket]:
    """Yield the IPv4 and IPv6 sockets of *protocol* in this thread's network namespace.

    Sockets that come or go meanwhile may be missed. Of TCP, the kernel's tables have only those
    that listen, connect or are connected. KernelError where the kernel has no such diagnosis.
    """
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_SOCK_DIAG) as netlink:
        for family in (socket.AF_INET, socket.AF_INET6):
            request = _REQUEST.pack(family, protocol, 0, _ALL_STATES)
            size, flags = _HEADER.size + len(request), _NLM_F_REQUEST | _NLM_F_DUMP
            netlink.send(_HEADER.pack(size, _SOCK_DIAG_BY_FAMILY, flags, 0, 0) + request)
            for data in _answers(netlink):
                yield _decode(protocol, data)


def _answers(netlink: socket.socket) -> Iterator[bytes]:
    while True:
        data = netlink.recv(1 << 16)
        at = 0
        while at < len(data):
            size, kind, *_ = _HEADER.unpack_from(data, at)
            if kind == _NLMSG_DONE:
                return
            if kind == _NLMSG_ERROR:
                (number,) = struct.unpack_from("=i", data, at + _HEADER.size)
                hint = "load the kernel's modules tcp_diag and udp_diag"
                hint = hint if -number == errno.ENOENT else ""
                raise KernelError("listing sockets with sock_diag(7)", -number, hint=hint)
            yield data[at + _HEADER.size : at + size]
            at += size + -size % 4


def _decode(protocol: int, data: bytes) -> DiagSocket:
    family, state, local_port, remote_port, local, remote, cookie, inode = _ANSWER.unpack_from(data)
    return DiagSocket(
        protocol,
        family,
        state,
        _address(family, local),
        int.from_bytes(local_port, "big"),
        _address(family, remote),
        int.from_bytes(remote_port, "big"),
        cookie,
        inode,
        _cgroup(data),
    )


def _cgroup(data: bytes) -> int:
    at = _ANSWER.size
    while at + _ATTRIBUTE.size <= len(data):
        size, kind = _ATTRIBUTE.unpack_from(data, at)
        if kind == _INET_DIAG_CGROUP_ID:
            return int.from_bytes(data[at + _ATTRIBUTE.size : at + size], sys.byteorder)
        at += size + -size % 4
    return 0


def _address(family: int, data: bytes) -> bytes:
    return _MAPPED + data[:4] if family == socket.AF_INET else data
