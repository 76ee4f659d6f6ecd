"""Layouts of C structs, read from the BTF of an object, and the codecs made from them.

A record type in Python is a NamedTuple whose fields are the members of the C struct, in order,
without those called pad, reserved or lock (a bpf_spin_lock, which the kernel hides). A codec
refuses a type that does not match, so that C and Python cannot drift. Integers stay integers;
arrays and nested structs are bytes.
"""

import struct
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar, get_type_hints

from sockhop.kernel._libbpf import ffi, lib

__all__ = ["Codec", "Layouts", "Member"]

T = TypeVar("T")

_UNSIGNED = {1: "B", 2: "H", 4: "I", 8: "Q"}
_FILLERS = ("pad", "reserved", "lock")


class Member(NamedTuple):
    """A member of a C struct: its name, its offset in bytes and its code for struct.Struct."""

    name: str
    offset: int
    code: str


class Codec(Generic[T]):
    """Turns values of T into the bytes of a C type and back; `size` in bytes.

    T is int for a C integer, bytes for anything taken as it is, else a NamedTuple.
    """

    def __init__(self, kind: type[T], packer: struct.Struct) -> None:
        self.kind = kind
        self.size = packer.size
        self._packer = packer
        self.pack = packer.pack
        """Return the bytes of a value given as its fields: faster than encode() in bulk."""
        self._make: Any = getattr(kind, "_make", None)

    def encode(self, value: T) -> bytes:
        """Return the bytes of *value*; struct.error where a field does not fit."""
        if self._make is None:
            return self._packer.pack(value)
        return self._packer.pack(*value)  # type: ignore[misc]

    def decode(self, data: Any) -> T:
        """Return the value that *data*, a buffer of `size` bytes, holds."""
        fields = self._packer.unpack(data)
        return fields[0] if self._make is None else self._make(fields)  # type: ignore[no-any-return]

    def decode_many(self, data: Any) -> list[T]:
        """Return the values that stand one after the other in *data*."""
        rows = self._packer.iter_unpack(data)
        return [row[0] for row in rows] if self._make is None else [self._make(r) for r in rows]


class Layouts:
    """The types of one BPF object file (`.bpf.o`)."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._btf = lib.btf__parse(str(path).encode(), ffi.NULL)
        if self._btf == ffi.NULL:
            raise ValueError(f"{path}: no BTF (is it a BPF object built with -g?)")
        self._btf = ffi.gc(self._btf, lib.btf__free)

    def members(self, name: str) -> list[Member]:
        """Return the members of `struct name` in order of their offsets."""
        number = lib.btf__find_by_name_kind(self._btf, name.encode(), lib.BTF_KIND_STRUCT)
        if number < 0:
            raise ValueError(f"{self._path}: no struct {name} in its BTF")
        kind = lib.btf__type_by_id(self._btf, number)
        table = lib.btf_members(kind)
        return [self._member(table[i]) for i in range(lib.btf_vlen(kind))]

    def size(self, name: str) -> int:
        """Return the size of `struct name` in bytes."""
        number = lib.btf__find_by_name_kind(self._btf, name.encode(), lib.BTF_KIND_STRUCT)
        return int(lib.btf__resolve_size(self._btf, number))

    def codec(self, kind: type[T], name: str) -> Codec[T]:
        """Return the codec of NamedTuple *kind* for `struct name`; ValueError on any difference."""
        members = self.members(name)
        fields = get_type_hints(kind)
        used = [member for member in members if not member.name.startswith(_FILLERS)]
        if [member.name for member in used] != list(fields):
            raise ValueError(
                f"{kind.__name__} has the fields {list(fields)}, "
                f"struct {name} the members {[member.name for member in used]}"
            )
        for member in used:
            wanted = bytes if member.code.endswith("s") else int
            if fields[member.name] is not wanted:
                raise ValueError(
                    f"{kind.__name__}.{member.name} is not {wanted.__name__}, as in struct {name}"
                )
        return Codec(kind, _packer(members, self.size(name)))

    def _member(self, member: Any) -> Member:
        name = ffi.string(lib.btf__name_by_offset(self._btf, member.name_off)).decode()
        size = int(lib.btf__resolve_size(self._btf, member.type))
        kind = lib.btf__type_by_id(self._btf, lib.btf__resolve_type(self._btf, member.type))
        if lib.btf_kind(kind) != lib.BTF_KIND_INT:
            return Member(name, member.offset // 8, f"{size}s")
        code = _UNSIGNED[size]
        signed = lib.btf_int_encoding(kind) & lib.BTF_INT_SIGNED
        return Member(name, member.offset // 8, code.lower() if signed else code)


def _packer(members: list[Member], size: int) -> struct.Struct:
    form, offset = "=", 0
    for member in members:
        width = struct.calcsize("=" + member.code)
        gap = member.offset - offset
        filler = member.name.startswith(_FILLERS)
        form += (f"{gap}x" if gap else "") + (f"{width}x" if filler else member.code)
        offset = member.offset + width
    return struct.Struct(form + (f"{size - offset}x" if size > offset else ""))
