"""The structs of bpf/audit.h as Python sees them; field by field checked against its BTF."""

import socket
from enum import IntEnum, IntFlag, StrEnum
from typing import NamedTuple

from sockhop.datapath.sockets import TCP_STATES
from sockhop.model import endpoint, unpack_address

__all__ = [
    "AuditEnd",
    "AuditFlag",
    "AuditSocket",
    "Doom",
    "Handler",
    "HealRecord",
    "HealResult",
    "is_closed",
]

_CLOSED = TCP_STATES.index("UNCONN") + 1


class AuditFlag(IntFlag):
    """`flags` of a socket."""

    PSOCK = 1
    HANDLERS = 2
    PARSER = 4
    MORE = 8
    IPV6ONLY = 16


class Handler(StrEnum):
    """Whose functions a socket's system calls run (sk_prot of struct sock)."""

    TCP = "tcp"
    TCP_BPF = "tcp_bpf"
    KTLS = "ktls"
    MPTCP = "mptcp"
    OTHER = "other"


class AuditSocket(NamedTuple):
    """struct audit_socket. Addresses are 16 bytes, IPv4 mapped; `netns` is an inode."""

    local_address: bytes
    remote_address: bytes
    sock: int
    cookie: int
    inode: int
    netns: int
    interface: int
    spliced: int
    local_port: int
    remote_port: int
    family: int
    protocol: int
    state: int
    flags: int
    acknowledged: int
    received: int
    unread: int
    waiting: int
    rcv_nxt: int
    snd_una: int
    copied_seq: int
    segs_in: int
    segs_out: int
    ulp: bytes
    first_size: int
    first: int

    @property
    def local(self) -> str:
        """Its own address and port."""
        return endpoint(unpack_address(self.local_address), self.local_port)

    @property
    def remote(self) -> str:
        """The address and port of its peer."""
        return endpoint(unpack_address(self.remote_address), self.remote_port)

    @property
    def state_name(self) -> str:
        """The socket's state as ss names it; `CLOSE` of TCP that is not connected."""
        if self.is_closed:
            return "CLOSE"
        return TCP_STATES[self.state - 1] if 0 < self.state <= len(TCP_STATES) else str(self.state)

    @property
    def is_internet(self) -> bool:
        """Whether it has addresses and ports."""
        return self.family in (socket.AF_INET, socket.AF_INET6)

    @property
    def is_closed(self) -> bool:
        """Whether it is a TCP socket whose connection is over."""
        return is_closed(self.protocol, self.state)

    @property
    def handler(self) -> Handler:
        """Whose functions serve it."""
        ulp = self.ulp.rstrip(b"\0")
        if ulp:
            return {b"tls": Handler.KTLS, b"mptcp": Handler.MPTCP}.get(ulp, Handler.OTHER)
        return Handler.TCP_BPF if self.flags & AuditFlag.HANDLERS else Handler.TCP

    @property
    def identity(self) -> tuple[int, int, bytes, bytes, int, int, int]:
        """What tells this socket in this state of its life from every other."""
        return (
            *(self.sock, self.cookie, self.local_address, self.remote_address),
            *(self.local_port, self.remote_port, self.state),
        )


def is_closed(protocol: int, state: int) -> bool:
    """Whether a socket is a TCP socket whose connection is over."""
    return protocol == socket.IPPROTO_TCP and state == _CLOSED


class AuditEnd(NamedTuple):
    """struct audit_end; `socket` is an encoded :class:`AuditSocket`."""

    socket: bytes
    receiver: bytes


class Doom(NamedTuple):
    """struct doom."""

    local_address: bytes
    remote_address: bytes
    sock: int
    cookie: int
    local_port: int
    remote_port: int
    state: int
    lose: int


class HealResult(IntEnum):
    """What became of an entry that was to be deleted."""

    DELETED = 0
    CHANGED = 1
    UNREAD = 2
    REFUSED = 3


class HealRecord(NamedTuple):
    """struct heal_record."""

    unread: int
    error: int
    result: int
    more: int
