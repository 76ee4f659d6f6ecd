"""The structs of bpf/splice.h as Python sees them; field by field checked against its BTF."""

import struct
from enum import IntEnum
from typing import NamedTuple

__all__ = [
    "LaneMode",
    "OwnerKind",
    "SpliceCounters",
    "SpliceKey",
    "SpliceLane",
    "SpliceMode",
    "SpliceOwner",
    "SplicePlace",
    "SplicePolicy",
    "SpliceReason",
    "SpliceRecord",
    "SpliceSetting",
    "reason_counts",
]


class SpliceSetting(IntEnum):
    """Indices of the map `splice_settings`."""

    OFF = 0
    CGROUPS = 1


class SpliceMode(IntEnum):
    """`mode` of a policy."""

    NEVER = 0
    ON = 1
    AUTO = 2


class OwnerKind(IntEnum):
    """What the id of a :class:`SpliceOwner` is."""

    NETNS = 0
    CGROUP = 1


class LaneMode(IntEnum):
    """`mode` of a direction."""

    UNDECIDED = 0
    SPLICED = 1
    STACK = 2


class SpliceReason(IntEnum):
    """Why a direction is on the stack, or a socket was left alone."""

    NONE = 0
    BUDGET = 1
    BACKLOG = 2
    GONE = 3
    LEFT = 4
    SWITCHED_OFF = 5
    SHUT = 6
    SENT_BEFORE = 7
    UNPAIRED = 8
    ULP = 9
    BUSY = 10
    KERNEL = 11
    FULL = 12
    CONTROL = 13

    @property
    def text(self) -> str:
        """How commands and metrics name it: `sent-before`; "" for NONE."""
        return self.name.lower().replace("_", "-") if self else ""


class SplicePolicy(NamedTuple):
    """struct splice_policy."""

    service: int
    budget: int
    leave_after: int
    mode: int
    dialled: int


class SplicePlace(NamedTuple):
    """struct splice_place; `address` as sockhop.model.pack_address() gives it."""

    address: bytes
    netns: int
    port: int


class SpliceOwner(NamedTuple):
    """struct splice_owner."""

    id: int
    kind: int


class SpliceKey(NamedTuple):
    """struct splice_key: a connection, seen the same from both ends."""

    a_address: bytes
    b_address: bytes
    netns: int
    a_sequence: int
    b_sequence: int
    a_port: int
    b_port: int


class SpliceLane(NamedTuple):
    """struct splice_lane: the way out of one socket; `key` is an encoded :class:`SpliceKey`."""

    key: bytes
    pair: int
    peer: int
    peer_sock: int
    since: int
    spliced: int
    uncounted: int
    stacked: int
    leaving: int
    queued: int
    sequence: int
    service: int
    budget: int
    leave_after: int
    is_a: int
    is_client: int
    mode: int
    reason: int


class SpliceCounters(NamedTuple):
    """struct splice_counters; `reasons` are u64, one for each :class:`SpliceReason`."""

    pairs: int
    spliced_bytes: int
    stack_bytes: int
    answers: int
    answer_time: int
    control_answers: int
    control_time: int
    removed: int
    reasons: bytes


class SpliceRecord(NamedTuple):
    """struct splice_record; `lane` is an encoded :class:`SpliceLane`."""

    lane: bytes
    cookie: int
    inode: int
    netns_inode: int
    state: int
    has_lane: int
    queue_empty: int


_REASONS = struct.Struct(f"={len(SpliceReason)}Q")


def reason_counts(counters: SpliceCounters) -> dict[SpliceReason, int]:
    """Return how often each reason came up."""
    return dict(zip(SpliceReason, _REASONS.unpack(counters.reasons), strict=True))
