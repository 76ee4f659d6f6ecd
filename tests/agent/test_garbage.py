"""An agent that applies changes for months does not keep what was garbage at each of them."""

import gc
import weakref
from collections.abc import Iterator

import pytest

from sockhop.agent import sync
from sockhop.agent.sync import Garbage

pytestmark = pytest.mark.unit

CHANGES = 1100
AT_ONCE = 10


class Node:
    """Part of a cycle, such as a finished check and its timeout."""

    def __init__(self) -> None:
        self.me = self


@pytest.fixture(autouse=True)
def thawed() -> Iterator[None]:
    yield
    gc.unfreeze()


def left_over() -> int:
    """Return how many cycles are left after many changes, each of which has met some."""
    garbage, seen = Garbage(), weakref.WeakSet[Node]()
    for _ in range(CHANGES):
        with garbage.kept():
            for _ in range(AT_ONCE):
                seen.add(Node())
    return len(seen)


def test_garbage_goes() -> None:
    assert left_over() < CHANGES * AT_ONCE // 2


def test_a_mutant_that_never_looks_keeps_all_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sync, "_THAW_EVERY", CHANGES + 1)
    assert left_over() == CHANGES * AT_ONCE


def test_the_collector_is_on_afterwards() -> None:
    with Garbage().kept():
        assert not gc.isenabled()
    assert gc.isenabled()
