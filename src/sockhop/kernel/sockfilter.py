"""Bytecode by which the kernel chooses sockets (struct inet_diag_bc_op, net/ipv4/inet_diag.c)."""

import socket
import struct
from collections.abc import Collection

__all__ = ["PEERS_MAX", "any_network", "any_peer"]

PEERS_MAX = 64
"""The kernel tries one after the other for each socket: of more, it is quicker to ask for all."""

_JMP, _D_COND = 1, 8  # INET_DIAG_BC_JMP, INET_DIAG_BC_D_COND
_OP = struct.Struct("=BBH")  # struct inet_diag_bc_op: code, yes, no
_CONDITION = struct.Struct("=BB2xi")  # struct inet_diag_hostcond: family, prefix_len, port
_MAPPED = bytes(10) + b"\xff\xff"


def any_peer(peers: Collection[tuple[bytes, int]]) -> bytes:
    """Return bytecode for the sockets that are connected to one of *peers*; b"" for all sockets.

    A peer is 16 bytes of address, IPv4 mapped, and a port. An IPv4 condition also holds for an
    IPv6 socket with that peer mapped.
    """
    return any_network([(address, 128, port) for address, port in peers])


def any_network(networks: Collection[tuple[bytes, int, int]]) -> bytes:
    """Return bytecode for the sockets that are connected into one of *networks*; b"" for all.

    A network is 16 bytes of address, IPv4 mapped, how many bits of it count, and a port, -1 for
    any.
    """
    if not 0 < len(networks) <= PEERS_MAX:
        return b""
    code, last = b"", True
    for network in networks:  # from the last to the first: jumps are relative and go forward
        condition = _condition(*network)
        size = _OP.size + len(condition)
        if last:
            # Just behind the end means no (inet_diag_bc_run).
            code, last = _OP.pack(_D_COND, size, size + _OP.size) + condition, False
            continue
        accept = _OP.pack(_JMP, _OP.size, _OP.size + len(code))
        code = _OP.pack(_D_COND, size, size + _OP.size) + condition + accept + code
    return code


def _condition(address: bytes, length: int, port: int) -> bytes:
    if length >= 96 and address.startswith(_MAPPED):
        return _CONDITION.pack(socket.AF_INET, length - 96, port) + address[12:]
    return _CONDITION.pack(socket.AF_INET6, length, port) + address
