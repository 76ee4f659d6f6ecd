"""The table of docs/kernels.md says what the runs said."""

from pathlib import Path

import pytest

from tests.vm.capabilities import CAPABILITIES
from tests.vm.results import RESULTS, TABLE, Capability, Result, load, render, with_table

pytestmark = pytest.mark.unit

REPO = Path(__file__).parents[2]


def test_the_page_shows_the_results() -> None:
    text = TABLE.read_text()
    assert text == with_table(text, load(RESULTS.read_bytes()))


@pytest.mark.parametrize("name", CAPABILITIES)
def test_what_shows_it_is_there(name: str) -> None:
    for part in CAPABILITIES[name]:
        if not part.startswith("-k "):
            file, _, test = part.partition("::")
            assert f"def {test.partition('[')[0]}(" in (REPO / file).read_text() or not test


def test_what_a_cell_says() -> None:
    old = {"policies": Capability(2, 2), "splicing": Capability(0, 1, "no helper (EINVAL)")}
    new = {"policies": Capability(1, 3, "connect: EPERM")}
    table = render([Result("6.1", "6.1.176-1", {}, old), Result("7", "7.3.4-1~b", {}, new)])
    assert table == (
        "|  | 6.1.176 | 7.3.4 |\n| --- | --- | --- |\n"
        "| policies | yes | 1 of 3: connect: EPERM |\n"
        "| splicing | no helper (EINVAL) | not tried |\n"
    )
