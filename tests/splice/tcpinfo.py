"""What the stack itself says of a socket (struct tcp_info of include/uapi/linux/tcp.h)."""

import socket
import struct
from typing import NamedTuple

__all__ = ["SYN_DATA", "TcpInfo", "tcp_info"]

SYN_DATA = 32
"""TCPI_OPT_SYN_DATA: bytes in the SYN were acknowledged."""


class TcpInfo(NamedTuple):
    """Segments with data, and bytes, that have gone by the stack; `options`: tcpi_options."""

    data_segs_in: int
    data_segs_out: int
    bytes_sent: int
    options: int


def tcp_info(of: socket.socket) -> TcpInfo:
    """Return the TCP_INFO of *of*."""
    data = of.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
    segs_in, segs_out = struct.unpack_from("=II", data, 152)
    return TcpInfo(segs_in, segs_out, struct.unpack_from("=Q", data, 200)[0], data[5])
