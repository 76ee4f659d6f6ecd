"""The examples of docs/policies.md are what they say: complete, and nothing in them is refused."""

import re
from pathlib import Path

import pytest

from tests.sources.manifests import load_text

pytestmark = pytest.mark.unit

TEXT = (Path(__file__).parents[2] / "docs" / "policies.md").read_text()
EXAMPLES = re.findall(r"```yaml\n(.*?)```", TEXT, re.DOTALL)


@pytest.mark.parametrize("text", EXAMPLES, ids=range(len(EXAMPLES)))
def test_an_example_is_complete(tmp_path: Path, text: str) -> None:
    loaded = load_text(tmp_path, text, node_name="node-a")
    assert loaded.warnings == ()
    desired = loaded.desired
    assert desired.policies or desired.redirects
    assert not any(policy.refused for policy in desired.policies)
    for redirect in desired.redirects:
        assert redirect.frontends
        assert not redirect.refused
        assert redirect.exempt


def test_there_is_one_of_each() -> None:
    assert len(EXAMPLES) == 4
