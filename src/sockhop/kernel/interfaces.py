"""Network interfaces, asked with rtnetlink(7): their kinds, and where a veth leads to."""

import socket
import struct
from collections.abc import Iterator
from typing import NamedTuple

from sockhop.kernel.routes import attributes

__all__ = ["Interface", "interfaces_here", "namespace_number"]

_RTM_GETLINK, _RTM_NEWLINK = 18, 16
_NLM_F_REQUEST, _NLM_F_DUMP = 0x1, 0x300
_RTM_GETNSID = 90
_IFLA_IFNAME, _IFLA_MTU, _IFLA_LINK, _IFLA_MASTER, _IFLA_LINKINFO = 3, 4, 5, 10, 18
_IFLA_LINK_NETNSID = 37
_NETNSA_NSID, _NETNSA_FD = 1, 3
_IFLA_INFO_KIND = 1
_HEADER = struct.Struct("=IHHII")  # struct nlmsghdr: length, type, flags, sequence, port
_LINK = struct.Struct("=BxHiII")  # struct ifinfomsg: family, type, index, flags, change


class Interface(NamedTuple):
    """`number` is its index, `peer` that of a veth's other end, `master` that of its bridge, or 0.

    `peer_namespace`: see :func:`namespace_number`; None if the other end is in the same one.
    `kind`: veth, bridge, vxlan ...; "" of hardware and of lo.
    """

    number: int
    name: str
    kind: str
    mtu: int
    peer: int
    master: int
    peer_namespace: int | None


def interfaces_here() -> dict[int, Interface]:
    """Return the interfaces of this thread's network namespace by their indexes."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as netlink:
        size = _HEADER.size + _LINK.size
        asked = _HEADER.pack(size, _RTM_GETLINK, _NLM_F_REQUEST | _NLM_F_DUMP, 0, 0)
        netlink.send(asked + _LINK.pack(socket.AF_UNSPEC, 0, 0, 0, 0))
        return {each.number: each for each in _answers(netlink)}


def namespace_number(of: int) -> int:
    """Return by which number this thread's network namespace knows another, -1: by none.

    *of*: a descriptor of that one. RTM_GETNSID: rtnl_net_getid() in net/core/net_namespace.c.
    """
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as netlink:
        attribute = struct.pack("=HHI", 8, _NETNSA_FD, of)
        size = _HEADER.size + 4 + len(attribute)
        asked = _HEADER.pack(size, _RTM_GETNSID, _NLM_F_REQUEST, 0, 0)
        netlink.send(asked + bytes(4) + attribute)
        found = dict(attributes(netlink.recv(1 << 16), _HEADER.size + 4))
        number: int = struct.unpack("=i", found.get(_NETNSA_NSID, b"\xff" * 4))[0]
        return number


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
        _number(found.get(_IFLA_MTU)),
        _number(found.get(_IFLA_LINK)),
        _number(found.get(_IFLA_MASTER)),
        _number(found[_IFLA_LINK_NETNSID]) if _IFLA_LINK_NETNSID in found else None,
    )


def _text(data: bytes) -> str:
    return data.rstrip(b"\0").decode(errors="replace")


def _number(data: bytes | None) -> int:
    return int(struct.unpack("=I", data)[0]) if data else 0
