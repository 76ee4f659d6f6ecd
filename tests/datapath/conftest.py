"""One node for all tests of a module; each test installs its own services."""

from collections.abc import Iterator

import pytest

from tests.datapath.node import Node


@pytest.fixture(scope="module")
def node() -> Iterator[Node]:
    with Node() as made:
        yield made
