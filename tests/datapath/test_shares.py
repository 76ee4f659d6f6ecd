"""Each backend gets its share, by every algorithm."""

import math
from array import array
from collections import Counter
from fractions import Fraction
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sockhop.datapath.shares import alias_table, maglev_table, round_robin_table

pytestmark = pytest.mark.unit


@given(st.lists(st.integers(1, 65535), min_size=1, max_size=200))
def test_shares_are_the_weights(weights: list[int]) -> None:
    shares, n = alias_table(weights), len(weights)
    got = [Fraction(0)] * n
    for i, share in enumerate(shares):
        kept = Fraction(share.keep + 1, 1 << 32)
        got[i] += kept / n
        got[share.alias] += (1 - kept) / n
    for weight, chance in zip(weights, got, strict=True):
        assert abs(chance - Fraction(weight, sum(weights))) <= Fraction(n, 1 << 32)


def test_equal_weights_never_use_the_alias() -> None:
    assert {share.keep for share in alias_table([7] * 5)} == {0xFFFFFFFF}


BACKENDS = st.lists(
    st.tuples(st.integers(1, 200).map("10.1.0.{}:80".format), st.integers(1, 10)),
    min_size=1,
    max_size=12,
    unique_by=lambda pair: pair[0],
)


@given(BACKENDS, st.randoms())
def test_maglev_is_the_same_whatever_the_order(
    backends: list[tuple[str, int]], random: Random
) -> None:
    table = [backends[i] for i in maglev_table(tuple(backends))]
    shuffled = random.sample(backends, len(backends))
    assert [shuffled[i] for i in maglev_table(tuple(shuffled))] == table


@settings(deadline=None)
@given(BACKENDS)
def test_maglev_respects_weights(backends: list[tuple[str, int]]) -> None:
    table = Counter(maglev_table(tuple(backends)))
    total = sum(weight for _, weight in backends)
    for i, (_, weight) in enumerate(backends):
        assert abs(table[i] - weight / total * table.total()) <= len(backends) + 1


@pytest.mark.parametrize("n", [2, 4, 5, 10, 20, 40, 50, 100])
def test_maglev_moves_little_on_a_removal(n: int) -> None:
    backends = tuple((f"10.1.{i >> 8}.{i & 255}:80", 1) for i in range(n))
    before = [backends[i][0] for i in maglev_table(backends)]
    moved = []
    for gone in range(0, n, max(n // 5, 1)):
        left = backends[:gone] + backends[gone + 1 :]
        after = [left[i][0] for i in maglev_table(left)]
        # As the hooks do: a flow's hash is scaled to the size of the table.
        flows = [(flow + 0.5) / 100_000 for flow in range(100_000)]
        moved.append(
            sum(before[int(flow * len(before))] != after[int(flow * len(after))] for flow in flows)
            / len(flows)
        )
    print(n, moved)
    assert max(moved) <= 1 / n + 0.02


@given(st.lists(st.integers(1, 20), min_size=1, max_size=10))
def test_a_round_has_each_backend_as_often_as_its_weight(weights: list[int]) -> None:
    turns = round_robin_table(tuple(weights))
    divisor = math.gcd(*weights)
    assert Counter(turns) == {i: weight // divisor for i, weight in enumerate(weights)}


def test_a_round_is_smooth() -> None:
    assert round_robin_table((5, 1, 1)) == array("H", (0, 0, 1, 0, 2, 0, 0))


def test_a_long_round_is_shortened() -> None:
    turns = Counter(round_robin_table((65535, 65534, 1)))
    assert turns.total() <= 4100
    assert turns[2] == 1
    assert abs(turns[0] - turns[1]) <= 1
