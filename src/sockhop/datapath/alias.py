"""Vose's alias method: a weighted choice among n in constant time.

M. D. Vose, "A linear algorithm for generating random numbers with a given distribution",
IEEE Transactions on Software Engineering 17 (9), 1991.
"""

from collections.abc import Sequence
from typing import NamedTuple

from sockhop.datapath.records import ALWAYS_KEEP

__all__ = ["Share", "alias_table"]

_SCALE = 1 << 32


class Share(NamedTuple):
    """A slot is kept when a random u32 is at most `keep`; else slot `alias` is taken."""

    keep: int
    alias: int


def alias_table(weights: Sequence[int]) -> list[Share]:
    """Return a share for each weight (positive integers), exact to 2**-32 a slot."""
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
