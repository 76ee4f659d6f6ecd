"""Network interfaces, asked with rtnetlink(7): their kinds, and where a veth leads to."""

import socket
import struct
from collections.abc import Iterator
from typing import NamedTuple

from sockhop.kernel.routes import attributes

__all__ = ["Interface", "interfaces_here"]

_RTM_GETLINK, _RTM_NEWLINK = 18, 16
_NLM_F_REQUEST, _NLM_F_DUMP = 0x1, 0x300
_IFLA_IFNAME, _IFLA_MTU, _IFLA_LINK, _IFLA_MASTER, _IFLA_LINKINFO = 3, 4, 5, 10, 18
_IFLA_INFO_KIND = 1
_HEADER = struct.Struct("=IHHII")  # struct nlmsghdr: length, type, flags, sequence, port
_LINK = struct.Struct("=BxHiII")  # struct ifinfomsg: family, type, index, flags, change


class Interface(NamedTuple):
    """`number` is its index, `peer` that of a veth's other end, `master` that of its bridge, or 0.

    `kind`: veth, bridge, vxlan ...; "" of hardware and of lo.
    """

    number: int
    name: str
    kind: str
    mtu: int
    peer: int
    master: int


def interfaces_here() -> dict[int, Interface]:
    """Return the interfaces of this thread's network namespace by their indexes."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as netlink:
        size = _HEADER.size + _LINK.size
        asked = _HEADER.pack(size, _RTM_GETLINK, _NLM_F_REQUEST | _NLM_F_DUMP, 0, 0)
        netlink.send(asked + _LINK.pack(socket.AF_UNSPEC, 0, 0, 0, 0))
        return {each.number: each for each in _answers(netlink)}


def _answers(netlink: socket.socket) -> Iterator[Interface]:
    while True:
        data, at = netlink.recv(1 << 16), 0
        while at < len(data):
            size, kind, *_ = _HEADER.unpack_from(data, at)
            if kind != _RTM_NEWLINK:  # the end, or an error
                return
            yield _decode(data[at + _HEADER.size : at + size])
            at += size + -size % 4


def _decode(data: bytes) -> Interface:
    found = dict(attributes(data, _LINK.size))
    kind = dict(attributes(found.get(_IFLA_LINKINFO, b""), 0)).get(_IFLA_INFO_KIND, b"")
    return Interface(
        _LINK.unpack_from(data)[2],
        _text(found.get(_IFLA_IFNAME, b"")),
        _text(kind),
        *(_number(found.get(each)) for each in (_IFLA_MTU, _IFLA_LINK, _IFLA_MASTER)),
    )


def _text(data: bytes) -> str:
    return data.rstrip(b"\0").decode(errors="replace")


def _number(data: bytes | None) -> int:
    return int(struct.unpack("=I", data)[0]) if data else 0
