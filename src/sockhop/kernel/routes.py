"""Which source address the kernel would give a socket, asked with rtnetlink(7)."""

import errno
import socket
import struct
from collections.abc import Iterator
from typing import NamedTuple

from sockhop.kernel.syscall import KernelError

__all__ = ["Route", "Routes", "attributes"]

_RTM_GETROUTE = 26
_NLM_F_REQUEST = 0x1
_NLMSG_ERROR = 2
_RTA_DST, _RTA_SRC, _RTA_OIF, _RTA_GATEWAY, _RTA_PREFSRC, _RTA_MARK, _RTA_UID = (
    1,
    2,
    4,
    5,
    7,
    16,
    25,
)
_RTN_UNICAST, _RTN_LOCAL, _RTN_MULTICAST = 1, 2, 5
_MAPPED = bytes(10) + b"\xff\xff"

_HEADER = struct.Struct("=IHHII")  # struct nlmsghdr: length, type, flags, sequence, port
_ROUTE = struct.Struct("=8BI")  # struct rtmsg: family, two prefix lengths, ..., type, flags
_ATTRIBUTE = struct.Struct("=HH")  # struct rtattr: length, type


class Route(NamedTuple):
    """The source address of what is sent along it; `local`: it does not leave the namespace.

    `interface` is an index; `gateway` the packed address of the next hop, b"" where there is none.
    """

    source: bytes
    local: bool
    interface: int = 0
    gateway: bytes = b""


class Routes:
    """Asks for routes in the network namespace in which it was made. Use as a context manager."""

    def __init__(self) -> None:
        self._netlink = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)

    def close(self) -> None:
        """Close the netlink socket."""
        self._netlink.close()

    def __enter__(self) -> "Routes":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def find(
        self, to: bytes, *, bound: bytes = b"", device: int = 0, mark: int = 0, uid: int = 0
    ) -> Route | None:
        """Return the route of what is sent *to* there; None where nothing can be.

        Addresses are 16 bytes, IPv4 mapped. *bound* is the source that the socket is bound to,
        *device* the index of its interface, *mark* its SO_MARK, *uid* its owner. This is what
        connect() would find: ip_route_output_key_hash() and ip6_route_output() of the kernel.
        """
        family = socket.AF_INET if to[:12] == _MAPPED else socket.AF_INET6
        if bound and (bound[:12] == _MAPPED) != (family == socket.AF_INET):
            return None
        bits = 32 if family == socket.AF_INET else 128
        parts = [_attribute(_RTA_DST, _short(to)), _attribute(_RTA_UID, struct.pack("=I", uid))]
        if bound:
            parts.append(_attribute(_RTA_SRC, _short(bound)))
        if device:
            parts.append(_attribute(_RTA_OIF, struct.pack("=I", device)))
        if mark:
            parts.append(_attribute(_RTA_MARK, struct.pack("=I", mark)))
        asked = _ROUTE.pack(family, bits, bits if bound else 0, 0, 0, 0, 0, 0, 0) + b"".join(parts)
        size = _HEADER.size + len(asked)
        self._netlink.send(_HEADER.pack(size, _RTM_GETROUTE, _NLM_F_REQUEST, 0, 0) + asked)
        return self._answer(self._netlink.recv(1 << 16), bound)

    def _answer(self, data: bytes, bound: bytes) -> Route | None:
        _, kind, *_ = _HEADER.unpack_from(data)
        if kind == _NLMSG_ERROR:
            (number,) = struct.unpack_from("=i", data, _HEADER.size)
            if -number in _NO_ROUTE:
                return None
            raise KernelError("asking for a route with rtnetlink(7)", -number)
        kind = _ROUTE.unpack_from(data, _HEADER.size)[7]
        # IPv6 has routes for what is unreachable, too.
        if kind not in range(_RTN_UNICAST, _RTN_MULTICAST + 1):
            return None
        found = dict(attributes(data, _HEADER.size + _ROUTE.size))
        source = _long(found.get(_RTA_PREFSRC, b"")) or bound
        if not source:
            return None
        (interface,) = struct.unpack("=I", found.get(_RTA_OIF, bytes(4)))
        return Route(source, kind == _RTN_LOCAL, interface, _long(found.get(_RTA_GATEWAY, b"")))


# EINVAL: no such source, or 127.0.0.1 as the source of what leaves the node.
_NO_ROUTE = (
    errno.ENETUNREACH, errno.EHOSTUNREACH, errno.EINVAL, errno.EACCES, errno.EADDRNOTAVAIL,
    errno.ENODEV, errno.ENETDOWN, errno.ESRCH,
)  # fmt: skip


def _short(address: bytes) -> bytes:
    return address.removeprefix(_MAPPED) if address[:12] == _MAPPED else address


def _long(address: bytes) -> bytes:
    return _MAPPED + address if len(address) == 4 else address


def _attribute(number: int, value: bytes) -> bytes:
    size = _ATTRIBUTE.size + len(value)
    return _ATTRIBUTE.pack(size, number) + value + bytes(-size % 4)


def attributes(data: bytes, at: int) -> Iterator[tuple[int, bytes]]:
    """Yield numbers and values of the netlink attributes (struct rtattr) from *at* on."""
    while at + _ATTRIBUTE.size <= len(data):
        size, number = _ATTRIBUTE.unpack_from(data, at)
        yield number, data[at + _ATTRIBUTE.size : at + size]
        at += size + -size % 4
