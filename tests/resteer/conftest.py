"""A stage for all tests of a module, and a program for each test, which installs its services."""

from collections.abc import Iterator

import pytest

from tests.datapath.programs import Program
from tests.datapath.udp import Echoes, both
from tests.resteer.stage import Stage, at


@pytest.fixture(scope="module")
def node() -> Iterator[Stage]:
    with Stage() as made:
        yield made


@pytest.fixture(scope="module")
def echoes(node: Stage) -> Iterator[Echoes]:
    with Echoes(5) as made:
        yield made


@pytest.fixture
def program(node: Stage) -> Iterator[Program]:
    """A program that has not dialled yet."""
    node.install(at(1, *both(1)), at(2, *both(3)))
    with Program() as made:
        yield made
