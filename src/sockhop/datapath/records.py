"""The structs of bpf/sockhop.h as Python sees them; field by field checked against its BTF."""

from enum import IntEnum, IntFlag
from typing import NamedTuple

from sockhop.model import BackendState, FrontendType

__all__ = [
    "ABI",
    "ALWAYS_KEEP",
    "FRONTEND_TYPES",
    "STATES",
    "BackendRecord",
    "Counters",
    "FrontendFlag",
    "FrontendKey",
    "FrontendRecord",
    "LiveKey",
    "Provenance",
    "ServiceRecord",
    "Setting",
    "SlotKey",
    "SlotRecord",
    "SocketRecord",
    "Total",
    "word",
    "word_count",
    "word_generation",
]

ABI = 1
ALWAYS_KEEP = 0xFFFFFFFF
"""`keep` of a slot that never sends anyone to its alias."""

STATES = tuple(BackendState)
FRONTEND_TYPES = tuple(FrontendType)


class Setting(IntEnum):
    """Indices of the map `settings`."""

    ABI = 0
    BYPASS = 1
    GENERATION = 2
    NEXT_SERVICE = 3
    NEXT_BACKEND = 4
    FALLBACK = 5


class Total(IntEnum):
    """Indices of the map `totals`."""

    STORAGE_FAILED = 0
    LIVE_FULL = 1
    RETRIES = 2
    EXHAUSTED = 3


class FrontendFlag(IntFlag):
    """`flags` of a frontend."""

    SCOPED = 1
    ABSENT = 2


class FrontendKey(NamedTuple):
    """An address that clients dial; `netns` 0 for every namespace, else a cookie."""

    address: bytes
    netns: int
    port: int
    protocol: int


class FrontendRecord(NamedTuple):
    """What the hooks find for a frontend; `key` repeats the key's bytes."""

    key: bytes
    id: int
    service: int
    type: int
    flags: int


class SlotKey(NamedTuple):
    """One backend of one generation of a frontend."""

    frontend: int
    generation: int
    position: int


class SlotRecord(NamedTuple):
    """A backend with its share of the alias table; `key` repeats the key's bytes."""

    key: bytes
    backend: int
    address: bytes
    keep: int
    alias: int
    port: int
    weight: int
    state: int


class BackendRecord(NamedTuple):
    """A backend of a service, whether it serves or not."""

    service: int
    address: bytes
    port: int
    weight: int
    protocol: int
    state: int


class ServiceRecord(NamedTuple):
    """The name of a service, UTF-8, padded with NUL."""

    name: bytes


class Counters(NamedTuple):
    """What a frontend has seen since it was made."""

    connects: int
    no_backend: int


class LiveKey(NamedTuple):
    """Live sockets of a namespace on a backend."""

    netns: int
    service: int
    backend: int


class Provenance(NamedTuple):
    """What the kernel remembers of a balanced socket; `since` in ns of CLOCK_BOOTTIME."""

    frontend_address: bytes
    backend_address: bytes
    previous_address: bytes
    since: int
    netns: int
    service: int
    frontend: int
    backend: int
    generation: int
    frontend_port: int
    backend_port: int
    previous_port: int
    protocol: int
    flags: int


class SocketRecord(NamedTuple):
    """A balanced socket as the iterator writes it; `provenance` holds that struct's bytes."""

    provenance: bytes
    local_address: bytes
    remote_address: bytes
    cookie: int
    inode: int
    netns_inode: int
    local_port: int
    remote_port: int
    family: int
    state: int


def word(generation: int, count: int) -> int:
    """Return the service word: generation << 32 | count."""
    return generation << 32 | count


def word_generation(value: int) -> int:
    """Return the generation in a service word."""
    return value >> 32


def word_count(value: int) -> int:
    """Return the number of slots in a service word."""
    return value & 0xFFFFFFFF
