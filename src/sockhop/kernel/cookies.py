"""The number that the kernel knows a socket by, for as long as the machine runs."""

import socket
import sys

__all__ = ["socket_cookie"]

_SO_COOKIE = 57


def socket_cookie(own: socket.socket) -> int:
    """Return SO_COOKIE (Linux 4.12, 5daab9db7b65) of a socket that this process has."""
    return int.from_bytes(own.getsockopt(socket.SOL_SOCKET, _SO_COOKIE, 8), sys.byteorder)
