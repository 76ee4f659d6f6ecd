"""What the stack itself says of a socket (struct tcp_info of include/uapi/linux/tcp.h)."""

import socket
import struct
from typing import NamedTuple

__all__ = ["TcpInfo", "tcp_info"]


class TcpInfo(NamedTuple):
    """Segments with data, and bytes, that have gone by the stack."""

    data_segs_in: int
    data_segs_out: int
    bytes_sent: int


def tcp_info(of: socket.socket) -> TcpInfo:
    """Return the TCP_INFO of *of*."""
    data = of.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
    segs_in, segs_out = struct.unpack_from("=II", data, 152)
    return TcpInfo(segs_in, segs_out, struct.unpack_from("=Q", data, 200)[0])
