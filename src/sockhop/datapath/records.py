"""The structs of bpf/sockhop.h as Python sees them; field by field checked against its BTF."""

from enum import IntEnum, IntFlag
from typing import NamedTuple

from sockhop.model import Algorithm, BackendState, FrontendType

__all__ = [
    "ABI",
    "ALGORITHMS",
    "ALWAYS_KEEP",
    "BLOCK_ENTRIES",
    "COUNTED_LIVE",
    "FRONTEND_TYPES",
    "OWNER_BOUND",
    "REASONS",
    "STATES",
    "BackendRecord",
    "Client",
    "ClientKey",
    "Counters",
    "DatagramPeer",
    "DatagramPeers",
    "FrontendFlag",
    "FrontendKey",
    "FrontendRecord",
    "Layer",
    "LiveKey",
    "Move",
    "OverflowKey",
    "OverflowPeer",
    "OwnerRecord",
    "Provenance",
    "ServiceRecord",
    "Setting",
    "SlotKey",
    "SlotRecord",
    "SocketEnds",
    "SocketRecord",
    "TableBlock",
    "Total",
    "Watch",
    "word",
    "word_algorithm",
    "word_count",
    "word_generation",
]

ABI = 2
ALWAYS_KEEP = 0xFFFFFFFF
"""`keep` of a slot that never sends anyone to its alias."""

# The codes in the maps are positions here: append only.
STATES = tuple(BackendState)
FRONTEND_TYPES = tuple(FrontendType)
ALGORITHMS = tuple(Algorithm)
REASONS = (*Algorithm, "session affinity", "resteer")

COUNTED_LIVE = 1
"""Set in `counted` of a provenance whose socket is in the live index."""

OWNER_BOUND = 4
"""Set in `userlocks` of an owner's record where the program has bound the socket to its address."""

BLOCK_ENTRIES = 128
"""Positions of slots in one block of a table."""


class Setting(IntEnum):
    """Indices of the map `settings`."""

    ABI = 0
    BYPASS = 1
    GENERATION = 2
    NEXT_SERVICE = 3
    NEXT_BACKEND = 4
    FALLBACK = 5
    MOVING = 6
    REDIRECTS = 7
    WHOLE = 8


class Total(IntEnum):
    """Indices of the map `totals`."""

    STORAGE_FAILED = 0
    LIVE_FULL = 1
    RETRIES = 2
    EXHAUSTED = 3
    AMBIGUOUS = 4
    RESERVED = 5
    REJECTED = 6


class FrontendFlag(IntFlag):
    """`flags` of a frontend."""

    SCOPED = 1
    ABSENT = 2
    RESERVED = 4
    CLIENTS = 8
    LISTED_ONLY = 16


class Layer(IntEnum):
    """Where a frontend is looked up: redirects come first."""

    SERVICES = 0
    REDIRECTS = 1


class FrontendKey(NamedTuple):
    """An address that clients dial; `netns` 0 for every namespace, else a cookie."""

    address: bytes
    netns: int
    port: int
    protocol: int
    layer: int = Layer.SERVICES


class FrontendRecord(NamedTuple):
    """What the hooks find for a frontend; `key` repeats the key's bytes, `affinity` in seconds."""

    key: bytes
    id: int
    service: int
    affinity: int
    type: int
    flags: int


class ClientKey(NamedTuple):
    """A cgroup, by its id, that a frontend serves or not."""

    cgroup: int
    frontend: int


class Client(IntEnum):
    """Values of the map `clients`."""

    SERVED = 1
    EXCLUDED = 2


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


class TableBlock(NamedTuple):
    """A piece of a table; `entries` are BLOCK_ENTRIES u16 positions of slots."""

    key: bytes
    entries: bytes


class BackendRecord(NamedTuple):
    """A backend of a service, whether it serves or not; `id` repeats the key."""

    id: int
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
    previous_service: int
    previous_backend: int
    counted: int
    previous_counted: int
    frontend_port: int
    backend_port: int
    previous_port: int
    protocol: int
    reason: int


class DatagramPeers(NamedTuple):
    """What an unconnected UDP socket uses: `peer` holds the bytes of several DatagramPeer."""

    peer: bytes
    clock: int
    overflown: int


class DatagramPeer(NamedTuple):
    """The backend that a socket uses for a frontend; free where `backend_port` is 0."""

    frontend_address: bytes
    backend_address: bytes
    frontend_port: int
    backend_port: int
    backend: int
    used: int


class OverflowKey(NamedTuple):
    """A frontend (direction 0) or a backend (1) of a socket that has more than `peer` holds."""

    cookie: int
    address: bytes
    port: int
    direction: int


class OverflowPeer(NamedTuple):
    """The backend of that frontend, or the frontend of that backend."""

    address: bytes
    backend: int
    used: int
    port: int


class Move(NamedTuple):
    """That the thread `mover` is about to connect a socket; `backend` 0 for any."""

    peer_address: bytes
    since: int
    mover: int
    backend: int
    peer_port: int


class Watch(NamedTuple):
    """What the program of a socket has done while somebody else was about to connect it.

    `dials` counts how often it has connected it, the latest to `address` and `port`; `through` is
    dials + 1 at the time when a hook last let the mover through, 0 before.
    """

    address: bytes = bytes(16)
    dials: int = 0
    through: int = 0
    port: int = 0

    @property
    def noted(self) -> bool:
        """Whether it has since. Without a `through` no hook has run: they are gone, or bypassed."""
        return self.through not in (0, self.dials + 1)


class OwnerRecord(NamedTuple):
    """A descriptor of a socket; `command` is padded with NUL, OWNER_BOUND in `userlocks`."""

    cookie: int
    pid: int
    thread: int
    fd: int
    reader: int
    userlocks: int
    command: bytes


class SocketRecord(NamedTuple):
    """A socket as an iterator writes it: see :class:`sockhop.datapath.sockets.Socket`."""

    provenance: bytes
    local_address: bytes
    remote_address: bytes
    cookie: int
    inode: int
    cgroup: int
    acknowledged: int
    received: int
    interface: int
    unread: int
    waiting: int
    segments: int
    local_port: int
    remote_port: int
    family: int
    protocol: int
    state: int
    netns: int
    result: int


class SocketEnds(NamedTuple):
    """By which a socket is known apart from its cookie."""

    local_address: bytes
    remote_address: bytes
    local_port: int
    remote_port: int


def word(generation: int, algorithm: Algorithm, count: int) -> int:
    """Return the service word: generation << 32 | algorithm << 28 | count."""
    return generation << 32 | ALGORITHMS.index(algorithm) << 28 | count


def word_generation(value: int) -> int:
    """Return the generation in a service word."""
    return value >> 32


def word_count(value: int) -> int:
    """Return the number of slots, or of entries of a table, in a service word."""
    return value & 0x0FFFFFFF


def word_algorithm(value: int) -> Algorithm:
    """Return the algorithm in a service word."""
    return ALGORITHMS[value >> 28 & 0xF]
