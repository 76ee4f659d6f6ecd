"""How the backends of a frontend share its connections: slots, and the tables that name them."""

import hashlib
import math
from array import array
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

from sockhop.datapath.records import ALWAYS_KEEP
from sockhop.model import Algorithm, Backend

__all__ = ["Share", "alias_table", "maglev_table", "round_robin_table", "table_for"]

_SCALE = 1 << 32
_FREE = -1
# Largest primes below powers of four. At 400 entries a backend and more, a removal moves less than
# 2 % beyond the share of the backend that goes; at 100, as the paper has it, up to 3 %.
_ENTRIES_PER_BACKEND = 400
_MAGLEV_SIZES = (1021, 4093, 16381, 65521, 262139, 1048573, 4194301, 16777213)
_LONGEST_ROUND = 4096


class Share(NamedTuple):
    """A slot is kept when a random u32 is at most `keep`; else slot `alias` is taken."""

    keep: int
    alias: int


def alias_table(weights: Sequence[int]) -> list[Share]:
    """Return a share for each weight (positive integers), exact to 2**-32 a slot.

    A weighted choice among n in constant time: M. D. Vose, "A linear algorithm for generating
    random numbers with a given distribution", IEEE Trans. Software Engineering 17 (9), 1991.
    """
    n, total = len(weights), sum(weights)
    if len(set(weights)) <= 1:
        return [Share(ALWAYS_KEEP, i) for i in range(n)]
    # In units of total / n: a slot that has `total` is full.
    rest = [weight * n for weight in weights]
    small = [i for i in range(n) if rest[i] < total]
    large = [i for i in range(n) if rest[i] >= total]
    shares = [Share(ALWAYS_KEEP, i) for i in range(n)]
    while small and large:
        poor, rich = small.pop(), large.pop()
        shares[poor] = Share(max(rest[poor] * _SCALE // total - 1, 0), rich)
        rest[rich] -= total - rest[poor]
        (small if rest[rich] < total else large).append(rich)
    return shares


def table_for(algorithm: Algorithm, backends: tuple[Backend, ...]) -> "array[int]":
    """Return positions in *backends* (u16) in the order that *algorithm* takes them.

    Empty for the algorithms that need no table.
    """
    if algorithm is Algorithm.ROUND_ROBIN:
        return round_robin_table(tuple(backend.weight for backend in backends))
    if algorithm is Algorithm.MAGLEV:
        # A backend's state does not move it, and its place in the manifest must not.
        return maglev_table(tuple((str(backend), backend.weight) for backend in backends))
    return array("H")


@lru_cache(256)
def round_robin_table(weights: tuple[int, ...]) -> "array[int]":
    """Return one smooth round: each position as often as its weight, spread evenly.

    The smooth weighted round-robin of nginx (commit 52327e0627f4). Rounds of more than 4,096
    turns are shortened, to the nearest turn.
    """
    if not weights:
        return array("H")
    divisor = max(math.gcd(*weights), math.ceil(sum(weights) / _LONGEST_ROUND))
    turns = [max(round(weight / divisor), 1) for weight in weights]
    total, credit, round_ = sum(turns), [0] * len(turns), array("H")
    for _ in range(total):
        credit = [have + turn for have, turn in zip(credit, turns, strict=True)]
        best = max(range(len(credit)), key=credit.__getitem__)
        credit[best] -= total
        round_.append(best)
    return round_


@lru_cache(256)
def maglev_table(backends: tuple[tuple[str, int], ...]) -> "array[int]":
    """Return the Maglev table of (name, weight) pairs.

    D. Eisenbud et al., "Maglev: A Fast and Reliable Software Network Load Balancer", NSDI 2016,
    3.4. The same pairs give the same table whatever their order. A table of another size is
    another table, so sizes are far apart: from 2 to 3, 10 to 11, 40 to 41, 163 to 164 ... backends
    most flows move.
    """
    if not backends:
        return array("H")
    wanted = _ENTRIES_PER_BACKEND * len(backends)
    size = next((size for size in _MAGLEV_SIZES if size >= wanted), _MAGLEV_SIZES[-1])
    order = sorted(range(len(backends)), key=backends.__getitem__)
    walks = [_Walk(backends[i][0], size) for i in order]
    heaviest = max(weight for _, weight in backends)
    credits, table, filled = [0] * len(order), [_FREE] * size, 0
    while True:
        for number, i in enumerate(order):
            # A turn each time that the weights add up to the heaviest one's.
            credits[number] += backends[i][1]
            if credits[number] < heaviest:
                continue
            credits[number] -= heaviest
            table[walks[number].next_free(table)] = i
            filled += 1
            if filled == size:
                return array("H", table)


class _Walk:
    """A backend's permutation of the table's entries, taken one after the other."""

    def __init__(self, name: str, size: int) -> None:
        digest = hashlib.blake2b(name.encode(), digest_size=16).digest()
        self._at = int.from_bytes(digest[:8], "big") % size
        self._skip = int.from_bytes(digest[8:], "big") % (size - 1) + 1
        self._size = size

    def next_free(self, table: list[int]) -> int:
        while table[self._at] != _FREE:
            self._at = (self._at + self._skip) % self._size
        return self._at
