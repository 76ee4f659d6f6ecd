"""How the keys of sockhashes are laid out, and what they name.

A layout is written as its fields in order: `sip:16 dip:16 family:1 pad:3 sport:4be dport:4be`.

============ ===================================================================================
`sip` `dip`   the address of the socket itself, that of its peer; 4 or 16 bytes. IPv4 in 16 bytes
              may stand in the first 4, in the last 4, or be mapped
`sport`       their ports; 2 or 4 bytes; `be` (the default) is network order, in 4 bytes in either
`dport`       half of them; `le` is the order of an x86 processor
`cookie:8`    the socket's cookie, in the machine's byte order
`index:4`     a position that says nothing of the socket
`family`      any size; not looked at
`pad`         any size; zero
`any`         any size; not looked at
============ ===================================================================================
"""

import re
import struct
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

from sockhop.diagnose._compare import ffi, lib
from sockhop.errors import InputError

__all__ = ["COOKIE", "INDEX", "KNOWN", "Ends", "Field", "KeyLayout", "known_layouts", "parse_key"]

_ADDRESSES = ("sip", "dip")
_PORTS = ("sport", "dport")
_SIZES = {"sip": (4, 16), "dip": (4, 16), "sport": (2, 4), "dport": (2, 4), "cookie": (8,),
          "index": (4,)}  # fmt: skip
_FILLERS = ("family", "pad", "any")
_ENDS = (*_ADDRESSES, *_PORTS)
_FIELD = re.compile(r"([a-z]+):([1-9]\d{0,2})(be|le)?")
_HOST = "be" if sys.byteorder == "big" else "le"


class Ends(NamedTuple):
    """What a key says of its socket: packed addresses and ports, None for what it does not say."""

    local_address: bytes | None
    remote_address: bytes | None
    local_port: int | None
    remote_port: int | None


class Field(NamedTuple):
    """A field of a key: what it is, its size in bytes, and the byte order of a port."""

    name: str
    size: int
    order: str = ""

    def __str__(self) -> str:
        return f"{self.name}:{self.size}{self.order}"


@dataclass(frozen=True)
class KeyLayout:
    """The fields of a key, in order, and whose they are; see the module."""

    name: str
    fields: tuple[Field, ...]
    maps: tuple[str, ...] = ()

    def __str__(self) -> str:
        return " ".join(map(str, self.fields))

    @cached_property
    def size(self) -> int:
        """The size of a key in bytes."""
        return sum(field.size for field in self.fields)

    @property
    def is_tuple(self) -> bool:
        """Whether keys name a connection: only then can a stale one be in another's way."""
        return any(field.name in _PORTS for field in self.fields)

    @property
    def is_cookie(self) -> bool:
        """Whether keys name a socket."""
        return any(field.name == "cookie" for field in self.fields)

    @cached_property
    def raw(self) -> struct.Struct:
        """Unpacks the fields that say something of the socket, in order, as bytes."""
        codes = (
            f"{field.size}{'s' if field.name in (*_ENDS, 'cookie') else 'x'}"
            for field in self.fields
        )
        return struct.Struct("=" + "".join(codes))

    @cached_property
    def placed(self) -> tuple[tuple[int, Field], ...]:
        """The fields that :attr:`raw` unpacks, and where they stand in a key."""
        found, at = [], 0
        for field in self.fields:
            if field.name in (*_ENDS, "cookie"):
                found.append((at, field))
            at += field.size
        return tuple(found)

    def ends(self, key: bytes) -> Ends:
        """Return what *key* says of its socket's ends."""
        values: dict[str, bytes | int] = {}
        for (_, field), raw in zip(self.placed, self.raw.unpack(key), strict=True):
            if field.name in _ADDRESSES:
                values[field.name] = self.address(raw)
            elif field.name in _PORTS:
                values[field.name] = _port(raw, field.order)
        return Ends(*(values.get(name) for name in _ENDS))  # type: ignore[arg-type]

    @staticmethod
    @lru_cache(4096)
    def address(raw: bytes) -> bytes:
        """Return the packed address that 4 or 16 bytes of a key say."""
        lib.key_address(raw, len(raw), ffi.from_buffer(address := bytearray(16)))
        return bytes(address)

    def is_plausible(self, key: bytes) -> bool:
        """Whether *key* may be of this layout: padding is zero, ports are ports."""
        at = 0
        for field in self.fields:
            raw = key[at : at + field.size]
            at += field.size
            if field.name == "pad" and any(raw):
                return False
            if field.name in _PORTS and not 0 < _port(raw, field.order) <= 0xFFFF:
                return False
            if field.name in _ADDRESSES and not any(raw):
                return False
        return True


def parse_key(text: str) -> KeyLayout:
    """Return the layout that *text* describes; InputError says which field is wrong."""
    fields: list[Field] = []
    for word in text.split():
        found = _FIELD.fullmatch(word)
        if not found:
            raise InputError(f"--key: {word!r} is no field", hint="a field is NAME:SIZE, as sip:16")
        field = _checked(word, found[1], int(found[2]), found[3] or "")
        if field.name in (each.name for each in fields) and field.name not in _FILLERS:
            raise InputError(f"--key: {field.name} is there twice")
        fields.append(field)
    layout = KeyLayout("given", tuple(fields))
    if not layout.placed and not any(field.name == "index" for field in fields):
        raise InputError(
            "--key: no field says anything of a socket",
            hint="for example: sip:4 dip:4 sport:2be dport:2be",
        )
    return layout


def _checked(word: str, name: str, size: int, order: str) -> Field:
    if name not in _SIZES and name not in _FILLERS:
        raise InputError(
            f"--key: {word!r}: there is no field {name!r}",
            hint=f"fields are {', '.join((*_SIZES, *_FILLERS))}",
        )
    if size not in _SIZES.get(name, (size,)):
        sizes = " or ".join(map(str, _SIZES[name]))
        raise InputError(f"--key: {word!r}: {name} has {sizes} bytes")
    if order and name not in _PORTS:
        raise InputError(f"--key: {word!r}: only ports have a byte order")
    return Field(name, size, (order or "be") if name in _PORTS else "")


def _port(raw: bytes, order: str) -> int:
    return int(lib.key_port(raw, len(raw), order == "le"))


def _known(name: str, text: str, *maps: str) -> KeyLayout:
    return KeyLayout(name, parse_key(text).fields, maps)


COOKIE = _known("cookie", "cookie:8", "splice_sockets")
INDEX = _known("index", "index:4")

KNOWN = (
    # bpf/sockops/bpf_sockops.h up to v1.13. The Go struct (pkg/maps/sockmap) names the addresses
    # the other way round; the programs write the socket's own first.
    _known("cilium", "sip:16 dip:16 family:1 pad:3 sport:4be dport:4be", "cilium_sock_ops"),
    # bpf/sockops of istio-tcpip-bypass, for Envoy sidecars.
    _known("istio-bypass", "sip:16 dip:16 family:1 pad:7 sport:4be dport:4be", "map_redir"),
    # bpf/headers of merbridge, for Envoy sidecars; struct bpf_sock_tuple, IPv6, is the same.
    _known("merbridge", "sip:16 dip:16 sport:2be dport:2be", "sock_pair_map"),
    _known("sock_tuple", "sip:4 dip:4 sport:2be dport:2be"),
    # The examples that most tutorials of sk_msg redirection repeat.
    _known("redirect-sample", "sip:4 dip:4 family:1 pad:7 sport:4be dport:4be", "sock_ops_map"),
    _known("tutorial", "sip:4 dip:4 sport:4be dport:4be family:4", "sock_ops_map"),
    _known("addresses-ports", f"sip:16 dip:16 sport:4{_HOST} dport:4{_HOST}", "vanilla_sockets"),
    COOKIE,
    INDEX,
)


def known_layouts(name: str, key_size: int) -> Sequence[KeyLayout]:
    """Return the layouts that a map with this name may have, the likeliest first.

    The kernel cuts names to 15 bytes.
    """
    fitting = [layout for layout in KNOWN if layout.size == key_size]
    return sorted(fitting, key=lambda each: name not in (wanted[:15] for wanted in each.maps))
