"""BPF maps with typed keys and values (kernel/bpf/syscall.c, Documentation/bpf/maps.rst)."""

import errno
import os
import struct
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

from sockhop.kernel._libbpf import ffi, lib
from sockhop.kernel.btf import Codec
from sockhop.kernel.syscall import KernelError, check

__all__ = ["Map", "MapInfo", "U32", "U64", "map_ids", "map_info", "open_map", "open_pinned"]

K = TypeVar("K")
V = TypeVar("V")

_BATCH = 4096
_FEW = 1000
"""From here on, reading the whole map is quicker than looking each entry up."""
_ENTRIES_PER_LOOKUP = 4
"""So many entries of an array, which is always full, are read at once in the time of a lookup."""
# What a kernel without batch operations for this map answers: ENOTSUPP (524) has no name in libc.
_NO_BATCH = (errno.EINVAL, errno.EOPNOTSUPP, 524)


def _integer(code: str) -> Codec[int]:
    return Codec(int, struct.Struct("=" + code))


U32 = _integer("I")
U64 = _integer("Q")


class MapInfo(NamedTuple):
    """What the kernel says of a map (struct bpf_map_info)."""

    id: int
    name: str
    type: int
    key_size: int
    value_size: int
    max_entries: int


def map_info(fd: int) -> MapInfo:
    """Return the kernel's description of the map behind *fd*."""
    info = ffi.new("struct bpf_map_info *")
    size = ffi.new("__u32 *", ffi.sizeof("struct bpf_map_info"))
    check(lib.bpf_obj_get_info_by_fd(fd, info, size), "reading a map's info")
    name = ffi.string(info.name).decode()
    return MapInfo(info.id, name, info.type, info.key_size, info.value_size, info.max_entries)


def open_pinned(path: Path) -> int:
    """Return a descriptor of the pinned object at *path*; FileNotFoundError if there is none."""
    fd = lib.bpf_obj_get(str(path).encode())
    if fd == -errno.ENOENT:
        raise FileNotFoundError(errno.ENOENT, "no such pin", str(path))
    return check(fd, f"opening the pin {path}")


def map_ids() -> Iterator[int]:
    """Yield the ids of all maps of the system. KernelError without CAP_SYS_ADMIN."""
    number, following = 0, ffi.new("__u32 *")
    while True:
        result = lib.bpf_map_get_next_id(number, following)
        if result == -errno.ENOENT:
            return
        check(result, "listing the maps of the system")
        number = following[0]
        yield number


def open_map(number: int) -> int:
    """Return a descriptor of the map with the id *number*; FileNotFoundError if there is none."""
    fd = lib.bpf_map_get_fd_by_id(number)
    if fd == -errno.ENOENT:
        raise FileNotFoundError(errno.ENOENT, "no such map", str(number))
    return check(fd, f"opening the map {number}")


class Map(Generic[K, V]):
    """A map with keys K and values V. Owns its descriptor; closed by close() or `with`."""

    def __init__(self, fd: int, key: Codec[K], value: Codec[V]) -> None:
        self.fd = fd
        self.info = map_info(fd)
        self.name = self.info.name
        self.key = key
        self.value = value
        self._batch = True
        if (self.info.key_size, self.info.value_size) != (key.size, value.size):
            raise ValueError(
                f"map {self.name} has keys of {self.info.key_size} and values of "
                f"{self.info.value_size} bytes, expected {key.size} and {value.size}"
            )

    @property
    def max_entries(self) -> int:
        """How many entries the map can hold."""
        return self.info.max_entries

    def close(self) -> None:
        """Close the descriptor; the map lives on while it is pinned or used."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __enter__(self) -> "Map[K, V]":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def get(self, key: K) -> V | None:
        """Return the value of *key*, None if there is none."""
        found = self._lookup(self.key.encode(key))
        return None if found is None else self.value.decode(found)

    def get_many(self, keys: Iterable[K]) -> dict[K, V]:
        """Return the entries of *keys*, those that are there."""
        wanted = set(keys)
        if len(wanted) * _ENTRIES_PER_LOOKUP >= self.max_entries:
            return {key: value for key, value in self.items() if key in wanted}
        found = ((key, self.get(key)) for key in wanted)
        return {key: value for key, value in found if value is not None}

    def set(self, key: K, value: V, flags: int = 0) -> None:
        """Store *value*; KernelError with E2BIG where the map is full."""
        self._store(self.key.encode(key), self.value.encode(value), flags)

    def delete(self, key: K) -> bool:
        """Delete *key*; False if it was not there."""
        result = lib.bpf_map_delete_elem(self.fd, self.key.encode(key))
        if result == -errno.ENOENT:
            return False
        check(result, f"deleting from the map {self.name}")
        return True

    def items(self) -> list[tuple[K, V]]:
        """Return all entries. Of those that come and go meanwhile, some may be missed."""
        keys, values = self._dump()
        return list(zip(self.key.decode_many(keys), self.value.decode_many(values), strict=True))

    def keys(self) -> list[K]:
        """Return the keys of all entries, as :meth:`items` does."""
        return self.key.decode_many(self._dump()[0])

    def used(self) -> int:
        """Return how many entries there are."""
        return len(self._dump()[0]) // self.key.size

    def update_many(self, entries: Iterable[tuple[K, V]]) -> None:
        """Store all *entries*, in order, in batches (Linux 5.6) where the kernel can."""
        key, value = self.key.encode, self.value.encode
        self.update_encoded([(key(k), value(v)) for k, v in entries])

    def update_encoded(self, rows: Sequence[tuple[bytes, bytes]]) -> None:
        """Store entries that are encoded already, as :meth:`update_many` does."""
        for first in range(0, len(rows), _BATCH):
            chunk = rows[first : first + _BATCH]
            done = self._update_batch(chunk) if self._batch else 0
            for key, value in chunk[done:]:
                self._store(key, value)

    def first_difference(self, rows: Sequence[tuple[bytes, bytes]]) -> bytes | None:
        """Return the first key whose value is not the one in *rows*; None if all are."""
        if len(rows) < _FEW:
            found = {key: self._lookup(key) for key, _ in rows}
        else:
            keys, values = self._dump()
            found = dict(zip(_slices(keys, self.key.size), _slices(values, self.value.size),
                             strict=True))  # fmt: skip
        if dict(rows).items() <= found.items():  # all in C: there are 100,000
            return None
        return next((key for key, value in rows if found.get(key) != value), None)

    def delete_many(self, keys: Iterable[K]) -> None:
        """Delete all *keys*; those that are not there are passed over."""
        for key in keys:
            self.delete(key)

    def _store(self, key: bytes, value: bytes, flags: int = 0) -> None:
        result = lib.bpf_map_update_elem(self.fd, key, value, flags)
        check(result, f"writing to the map {self.name}")

    def _lookup(self, key: bytes) -> bytes | None:
        value = ffi.new("char[]", self.value.size)
        result = lib.bpf_map_lookup_elem(self.fd, key, value)
        if result == -errno.ENOENT:
            return None
        check(result, f"looking up in the map {self.name}")
        return bytes(ffi.buffer(value))

    def _update_batch(self, rows: Sequence[tuple[bytes, bytes]]) -> int:
        keys, values = map(b"".join, zip(*rows, strict=True))
        count = ffi.new("__u32 *", len(rows))
        result = lib.bpf_map_update_batch(self.fd, keys, values, count, ffi.NULL)
        if -result in _NO_BATCH:
            self._batch = False
            return 0
        if result < 0:
            raise KernelError(f"writing {len(rows)} entries to the map {self.name}", -result)
        return len(rows)

    def _dump(self) -> tuple[bytes, bytes]:
        try:
            return self._dump_batch()
        except KernelError as error:
            if error.errno not in _NO_BATCH:
                raise
            return self._dump_one_by_one()

    def _dump_batch(self) -> tuple[bytes, bytes]:
        # A hash hands out whole buckets: a batch smaller than the fullest one is ENOSPC.
        size, keys, values = _BATCH, bytearray(), bytearray()
        position, following = ffi.NULL, ffi.new("char[]", max(self.key.size, 8))
        count = ffi.new("__u32 *")
        while True:
            count[0] = size
            key_room = ffi.new("char[]", size * self.key.size)
            value_room = ffi.new("char[]", size * self.value.size)
            result = lib.bpf_map_lookup_batch(
                self.fd, position, following, key_room, value_room, count, ffi.NULL
            )
            if result == -errno.ENOSPC and size < self.max_entries:
                size *= 2
                continue
            if result not in (0, -errno.ENOENT):
                raise KernelError(f"reading the map {self.name}", -result)
            keys += ffi.buffer(key_room, count[0] * self.key.size)
            values += ffi.buffer(value_room, count[0] * self.value.size)
            if result:
                return bytes(keys), bytes(values)
            position, following = following, ffi.new("char[]", max(self.key.size, 8))

    def _dump_one_by_one(self) -> tuple[bytes, bytes]:
        keys, values = bytearray(), bytearray()
        for key in self._walk():
            value = ffi.new("char[]", self.value.size)
            if lib.bpf_map_lookup_elem(self.fd, key, value) == 0:
                keys += ffi.buffer(key)
                values += ffi.buffer(value)
        return bytes(keys), bytes(values)

    def _walk(self) -> Iterator[Any]:
        # Bounded: when the entry behind a key goes, the kernel starts from the first again.
        key: Any = ffi.NULL
        for _ in range(4 * self.max_entries):
            following = ffi.new("char[]", self.key.size)
            if lib.bpf_map_get_next_key(self.fd, key, following) < 0:
                return
            yield following
            key = following


def _slices(data: bytes, size: int) -> list[bytes]:
    return [part for (part,) in struct.iter_unpack(f"{size}s", data)]
