"""The frontends that Cilium's socket load balancer has, read from its pinned service maps."""

import os
import socket
import struct
from pathlib import Path

from sockhop.errors import SystemLackError
from sockhop.kernel.btf import Codec
from sockhop.kernel.maps import Map, map_info, open_pinned
from sockhop.kernel.mounts import mounts
from sockhop.model import Protocol, unpack_address

__all__ = ["CiliumFrontend", "cilium_frontends"]

CiliumFrontend = tuple[str, int, Protocol]
"""As `model.Frontend.key`."""

# struct lb4_key and struct lb6_key (Cilium's bpf/lib/common.h): address, port in network order,
# backend_slot (0 in the entry of the service itself), protocol (0: any), scope, padding.
_MAPS = {
    "cilium_lb4_services_v2": struct.Struct("=4s2sHBB2x"),
    "cilium_lb6_services_v2": struct.Struct("=16s2sHBB2x"),
}
_PROTOCOLS = {
    socket.IPPROTO_TCP: (Protocol.TCP,),
    socket.IPPROTO_UDP: (Protocol.UDP,),
    0: (Protocol.TCP, Protocol.UDP),
}


def cilium_frontends() -> frozenset[CiliumFrontend]:
    """Return what Cilium balances on this node, as far as its maps are pinned on a bpffs here.

    None where there are no such maps. SystemLackError where they cannot be read.
    """
    found: set[CiliumFrontend] = set()
    for mount in mounts():
        if mount.type == "bpf":
            for name, key in _MAPS.items():
                found |= _frontends(mount.point / "tc" / "globals" / name, key)
    return frozenset(found)


def _frontends(pin: Path, key: struct.Struct) -> set[CiliumFrontend]:
    try:
        fd = open_pinned(pin)
    except FileNotFoundError:
        return set()
    info = map_info(fd)
    if info.key_size != key.size:
        os.close(fd)
        raise SystemLackError(
            f"{pin}: keys of {info.key_size} bytes, not {key.size}: this Cilium is not known",
            hint="which frontends it balances cannot be told",
        )
    found: set[CiliumFrontend] = set()
    with Map(fd, Codec(bytes, struct.Struct(f"{key.size}s")), _anything(info.value_size)) as map_:
        for entry in map_.keys():
            address, port, slot, protocol, _ = key.unpack(entry)
            if slot == 0:
                text = _text(address)
                number = int.from_bytes(port, "big")
                found |= {(text, number, which) for which in _PROTOCOLS.get(protocol, ())}
    return found


def _anything(size: int) -> Codec[bytes]:
    return Codec(bytes, struct.Struct(f"{size}s"))


def _text(address: bytes) -> str:
    if len(address) == 4:
        return socket.inet_ntop(socket.AF_INET, address)
    return unpack_address(address)
