"""The table of docs/splicing.md is what happens."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.splice.differences import ROWS, Ends
from tests.splice.stage import Stage

pytestmark = pytest.mark.kernel

_PAGE = Path(__file__).parents[2] / "docs" / "splicing.md"


@pytest.fixture(scope="module")
def stage() -> Iterator[Stage]:
    with Stage() as made:
        yield made


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.__name__)
def test_a_row_of_the_table(stage: Stage, row: Callable[[Ends], str]) -> None:
    with stage.switched_off(), Ends(stage) as ends:
        plain = row(ends)
    with Ends(stage) as ends:
        spliced = row(ends)
    seen = f"| {row.__doc__} | {plain} | {'the same' if spliced == plain else spliced} |"
    assert seen in _PAGE.read_text().splitlines()


def test_the_table_has_no_other_rows() -> None:
    page = _PAGE.read_text()
    table = page[page.index("| | plain | spliced |") :].split("\n\n")[0]
    assert len(table.splitlines()) == 2 + len(ROWS)
