"""The kernel's types as it tells them, or as a file from another node does: raw BTF.

Documentation/bpf/btf.rst has the format. Only what comparing kernels takes is read: the members of
structs, the names of functions, the values of enums.
"""

import struct
from collections.abc import Collection, Iterator
from enum import IntEnum
from pathlib import Path
from typing import NamedTuple

from sockhop.errors import InputError

__all__ = ["RUNNING", "BtfFile", "Kind", "is_btf"]

RUNNING = Path("/sys/kernel/btf/vmlinux")
"""The types of the running kernel."""

_MAGIC = 0xEB9F
_HEADER = struct.Struct("=HBBIIIII")
_TYPE = struct.Struct("=III")
_DEEPEST = 32
"""How many types may lie between a member and its name: pointers, arrays, qualifiers."""


class Kind(IntEnum):
    """BTF_KIND_*, as far as they are named here (include/uapi/linux/btf.h)."""

    INT = 1
    PTR = 2
    ARRAY = 3
    STRUCT = 4
    UNION = 5
    ENUM = 6
    FWD = 7
    TYPEDEF = 8
    VOLATILE = 9
    CONST = 10
    RESTRICT = 11
    FUNC = 12
    FUNC_PROTO = 13
    VAR = 14
    DATASEC = 15
    FLOAT = 16
    DECL_TAG = 17
    TYPE_TAG = 18
    ENUM64 = 19


# What follows struct btf_type: bytes in all, and bytes for each of its `vlen`.
_TAILS = {
    Kind.INT: (4, 0),
    Kind.ARRAY: (12, 0),
    Kind.STRUCT: (0, 12),
    Kind.UNION: (0, 12),
    Kind.ENUM: (0, 8),
    Kind.FUNC_PROTO: (0, 8),
    Kind.VAR: (4, 0),
    Kind.DATASEC: (0, 12),
    Kind.DECL_TAG: (4, 0),
    Kind.ENUM64: (0, 12),
}
_QUALIFIERS = {
    Kind.VOLATILE: "volatile ",
    Kind.CONST: "const ",
    Kind.RESTRICT: "",
    Kind.TYPE_TAG: "",
    Kind.TYPEDEF: "",
}
_TAGS = {Kind.STRUCT: "struct", Kind.UNION: "union", Kind.ENUM: "enum", Kind.ENUM64: "enum"}


def is_btf(data: bytes) -> bool:
    """Tell whether *data* begins as raw BTF of this machine's byte order does."""
    return data[:2] == _MAGIC.to_bytes(2, "little" if struct.pack("=H", 1)[0] else "big")


class _Type(NamedTuple):
    """struct btf_type; `at`: where what follows it begins; `size` is a type's id for most kinds."""

    name: int
    kind: Kind
    vlen: int
    bitfields: bool
    size: int
    at: int


class BtfFile:
    """Raw BTF. InputError, which names *source*, where the data is not that, or is damaged."""

    def __init__(self, data: bytes, source: str) -> None:
        self._data, self._source = data, source
        if not is_btf(data) or len(data) < _HEADER.size:
            raise InputError(
                f"{source}: this is no raw BTF of this machine's byte order",
                hint=f"a copy of {RUNNING} of the other node is",
            )
        _, version, _, header, types, types_size, strings, strings_size = _HEADER.unpack_from(data)
        self._first, self._end = header + types, header + types + types_size
        self._strings, self._strings_end = header + strings, header + strings + strings_size
        if version != 1 or max(self._end, self._strings_end) > len(data):
            raise self._damaged("its header names more than there is")
        # Type 0 is void.
        self._types: list[_Type] = [_Type(0, Kind.FWD, 0, False, 0, 0)]
        self._types.extend(self._read())

    @classmethod
    def open(cls, path: Path = RUNNING) -> "BtfFile":
        """Read a file, by default the running kernel's; InputError where it cannot be read."""
        try:
            return cls(path.read_bytes(), str(path))
        except OSError as error:
            raise InputError(f"{path}: {error.strerror}") from None

    def functions(self, prefixes: tuple[str, ...]) -> list[str]:
        """Return the names of functions that begin with one of *prefixes*, in order."""
        names = (self._name(each.name) for each in self._types if each.kind is Kind.FUNC)
        return sorted({name for name in names if name.startswith(prefixes)})

    def structs(self, names: Collection[str]) -> dict[str, dict[str, str]]:
        """Return the members of the structs *names*, those that there are, with their C types.

        Members of unnamed structs and unions within are among them, as C sees them. The first of
        several structs with one name counts.
        """
        found: dict[str, dict[str, str]] = {}
        for each in self._types:
            if each.kind is Kind.STRUCT and each.vlen:
                name = self._name(each.name)
                if name in names and name not in found:
                    found[name] = dict(self._members(each, 0))
        return {name: found[name] for name in names if name in found}

    def enum(self, name: str) -> dict[str, int]:
        """Return the values of `enum name` by their names; {} if there is none."""
        for each in self._types:
            if each.kind is Kind.ENUM and each.vlen and self._name(each.name) == name:
                rows = (self._unpack("=Ii", each.at + 8 * i) for i in range(each.vlen))
                return {self._name(where): value for where, value in rows}
        return {}

    def _read(self) -> Iterator[_Type]:
        at, end = self._first, self._end
        while at < end:
            name, info, size = self._unpack_from(_TYPE, at)
            try:
                kind = Kind(info >> 24 & 0x1F)
            except ValueError:
                raise self._damaged(f"a type of kind {info >> 24 & 0x1F}") from None
            vlen = info & 0xFFFF
            every, each = _TAILS.get(kind, (0, 0))
            at += _TYPE.size
            yield _Type(name, kind, vlen, bool(info >> 31), size, at)
            at += every + each * vlen
        if at != end:
            raise self._damaged("its last type is cut off")

    def _members(self, of: _Type, depth: int) -> Iterator[tuple[str, str]]:
        if depth > _DEEPEST:
            raise self._damaged("structs within structs without end")
        for i in range(of.vlen):
            where, number, offset = self._unpack("=III", of.at + 12 * i)
            name = self._name(where)
            kind = self._type(number)
            if name:
                width = offset >> 24 if of.bitfields else 0
                yield name, self._text(number) + (f":{width}" if width else "")
            elif kind.kind in (Kind.STRUCT, Kind.UNION):
                yield from self._members(kind, depth + 1)

    def _text(self, number: int) -> str:
        """The C text of a type, without what a typedef hides."""
        stars = front = ""
        for _ in range(_DEEPEST):
            if not number:
                return f"{front}void {stars}".rstrip()
            found = self._type(number)
            name = self._name(found.name)
            if found.kind is Kind.PTR:
                stars = "*" + stars
            elif found.kind is Kind.ARRAY:
                number, _index, count = self._unpack("=III", found.at)
                stars += f"[{count}]"
                continue
            elif found.kind is Kind.FUNC_PROTO:
                return f"function {stars}".rstrip()
            elif found.kind in _QUALIFIERS and found.kind is not Kind.TYPEDEF:
                front = _QUALIFIERS[found.kind] + front
            else:
                tag = _TAGS.get(found.kind, "struct" if found.kind is Kind.FWD else "")
                return " ".join(filter(None, (f"{front}{tag}".strip(), name or "{}"))) + (
                    f" {stars}" if stars else ""
                )
            number = found.size
        raise self._damaged("types that name each other without end")

    def _type(self, number: int) -> _Type:
        if number >= len(self._types):
            raise self._damaged(f"it has no type {number}")
        return self._types[number]

    def _name(self, offset: int) -> str:
        begin = self._strings + offset
        end = self._data.find(b"\0", begin, self._strings_end)
        if end < 0:
            raise self._damaged("a name lies outside of it")
        return self._data[begin:end].decode(errors="replace")

    def _unpack(self, form: str, at: int) -> tuple[int, ...]:
        return self._unpack_from(struct.Struct(form), at)

    def _unpack_from(self, form: struct.Struct, at: int) -> tuple[int, ...]:
        if at + form.size > self._end:
            raise self._damaged("a type is cut off")
        return form.unpack_from(self._data, at)

    def _damaged(self, what: str) -> InputError:
        return InputError(f"{self._source}: this BTF is damaged: {what}")
