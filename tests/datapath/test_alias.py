"""The alias table gives each backend its share, exactly."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sockhop.datapath.alias import alias_table

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
