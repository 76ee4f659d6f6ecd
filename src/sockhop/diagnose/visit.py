"""The loaded programs that read sockmaps, and TCP sockets with their handlers."""

import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from sockhop.datapath.sockets import read_iterator
from sockhop.diagnose.records import AuditEnd, AuditSocket
from sockhop.errors import InputError
from sockhop.kernel._libbpf import lib
from sockhop.kernel.btf import Codec
from sockhop.kernel.maps import MapInfo, map_ids, map_info, open_map, open_pinned
from sockhop.kernel.namespaces import Namespace, NamespaceGone, entered
from sockhop.kernel.objects import BpfObject, object_path
from sockhop.kernel.syscall import check

__all__ = ["End", "Entries", "OpenMap", "Visitor", "open_sockmap", "open_sockmaps"]

_READ = 1 << 16
_BUCKET = 32
"""More entries than a bucket has: there are as many buckets as the map has room for."""
SOCKMAP_TYPES = (lib.BPF_MAP_TYPE_SOCKMAP, lib.BPF_MAP_TYPE_SOCKHASH)


class OpenMap(NamedTuple):
    """A sockmap or sockhash: its descriptor, and what the kernel says of it."""

    fd: int
    info: MapInfo

    @property
    def is_hash(self) -> bool:
        """Whether it is a sockhash."""
        return bool(self.info.type == lib.BPF_MAP_TYPE_SOCKHASH)


def open_sockmaps(stack: ExitStack) -> list[OpenMap]:
    """Return all sockmaps and sockhashes of the system; *stack* closes them. Needs root."""
    found = []
    for number in map_ids():
        with suppress(FileNotFoundError):  # it is gone meanwhile
            fd = open_map(number)
            info = map_info(fd)
            if info.type in SOCKMAP_TYPES:
                stack.callback(os.close, fd)
                found.append(OpenMap(fd, info))
            else:
                os.close(fd)
    return found


def open_sockmap(stack: ExitStack, where: int | Path) -> OpenMap:
    """Return the sockmap or sockhash with this id, or pinned at this path; *stack* closes it.

    InputError if there is none.
    """
    name = f"map {where}" if isinstance(where, int) else str(where)
    try:
        fd = open_map(where) if isinstance(where, int) else open_pinned(where)
    except FileNotFoundError:
        raise InputError(
            f"{name}: there is none", hint="`sockhop audit` without options lists them"
        ) from None
    stack.callback(os.close, fd)
    info = map_info(fd)
    if info.type not in SOCKMAP_TYPES:
        raise InputError(
            f"{name}: this is no sockmap and no sockhash, but has the type {info.type}",
            hint="`sockhop audit` without options lists them",
        )
    return OpenMap(fd, info)


@dataclass(frozen=True)
class Entries:
    """The entries of a map one after the other in `data`: a struct audit_socket, then the key."""

    data: bytes
    size: int
    sockets: Codec[AuditSocket]

    def __len__(self) -> int:
        return len(self.data) // self.size

    def head(self, count: int) -> "Entries":
        """Return the first *count* of them."""
        return replace(self, data=self.data[: count * self.size])

    def key(self, number: int) -> bytes:
        """Return the key of one."""
        return self.data[number * self.size + self.sockets.size : (number + 1) * self.size]

    def socket(self, number: int) -> AuditSocket:
        """Return the socket of one."""
        return self.sockets.decode(
            self.data[number * self.size : number * self.size + self.sockets.size]
        )


class End(NamedTuple):
    """A TCP socket, and the kernel function that a recv() of it calls, "" if not known."""

    socket: AuditSocket
    receiver: str


class Visitor:
    """The loaded programs. Use as a context manager. Needs Linux 5.10."""

    def __init__(self) -> None:
        self._object = BpfObject(object_path("audit"))
        self.layouts = self._object.layouts
        self._sockets = self.layouts.codec(AuditSocket, "audit_socket")
        self._ends = self.layouts.codec(AuditEnd, "audit_end")

    def close(self) -> None:
        """Unload the programs."""
        self._object.close()

    def __enter__(self) -> "Visitor":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def entries(self, of: OpenMap) -> Entries:
        """Return the entries of a map. Of those that come and go meanwhile, some may be missed."""
        program = "sockhop_entries"
        link = check(
            lib.sockhop_iter_link(self._object.program(program), of.fd), f"linking {program}"
        )
        try:
            iterator = check(lib.bpf_iter_create(link), f"starting {program}")
        finally:
            os.close(link)
        size = self._sockets.size + of.info.key_size
        with os.fdopen(iterator, "rb", buffering=0) as stream:
            parts = iter(lambda: stream.read(_READ), b"")
            data = b"".join(_without_repeats(parts, size, of.info.key_size))
        return Entries(data, size, self._sockets)

    def ends(self, places: Iterable[Namespace]) -> list[End]:
        """Return the TCP sockets of *places*, those in the kernel's tables."""
        program = "sockhop_ends"
        link = check(lib.sockhop_iter_link(self._object.program(program), -1), f"linking {program}")
        found: list[End] = []
        try:
            for place in places:
                with suppress(NamespaceGone), entered(place):
                    for each in self._ends.decode_many(read_iterator(link, program)):
                        name = each.receiver.rstrip(b"\0").decode(errors="replace")
                        # A module's function is followed by its name.
                        found.append(End(self._sockets.decode(each.socket), name.split(" ")[0]))
        finally:
            os.close(link)
        return found


def _without_repeats(parts: Iterable[bytes], size: int, key_size: int) -> Iterator[bytes]:
    """Yield *parts* without the entries with which each repeats the end of the one before.

    Each read(2) starts with the first entry of the bucket in which the one before has stopped
    (sock_hash_seq_start in net/core/sock_map.c).
    """
    last: set[bytes] = set()
    for part in parts:
        at = 0
        while part[at + size - key_size : at + size] in last:
            at += size
        yield part[at:]
        ends = range(max(size, len(part) - _BUCKET * size), len(part) + 1, size)
        last = {part[end - key_size : end] for end in ends}
