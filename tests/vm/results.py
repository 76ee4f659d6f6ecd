"""What runs on other kernels have shown: kept as JSON, shown as the table of docs/kernels.md."""

import json
import re
from pathlib import Path
from typing import Any

import msgspec

from tests.vm.capabilities import CAPABILITIES
from tests.vm.kernels import cache_directory

__all__ = ["Capability", "Result", "load", "record", "render", "rewrite"]

_DOCS = Path(__file__).parents[2] / "docs"
TABLE = _DOCS / "kernels.md"
RESULTS = _DOCS / "kernels.json"
_MARKS = ("<!-- from kernels.json, by script/test-vm -->\n", "<!-- end -->\n")


class Capability(msgspec.Struct, frozen=True):
    """What the tests of a capability said: how many passed, how many there are, and why not all."""

    passed: int
    tests: int
    why: str = ""

    def __str__(self) -> str:
        if self.passed == self.tests:
            return "yes"
        return self.why if not self.passed else f"{self.passed} of {self.tests}: {self.why}"


class Result(msgspec.Struct, frozen=True):
    """A run on a kernel: `series` as it was asked for, `lacking` features with the reasons.

    `version` is that of Debian's package.
    """

    series: str
    version: str
    lacking: dict[str, str]
    capabilities: dict[str, Capability]


def record(result: Result) -> None:
    """Keep a result beside the kernels, for rewrite()."""
    _kept().mkdir(parents=True, exist_ok=True)
    path = _kept() / f"{result.series}.json"
    before = msgspec.json.decode(path.read_bytes(), type=Result) if path.exists() else None
    path.write_bytes(msgspec.json.encode(_joined(before, result)))


def _kept() -> Path:
    return cache_directory() / "results"


def _joined(before: Result | None, now: Result) -> Result:
    """Return *now*, with what only an earlier run on the same kernel has tried."""
    if before is None or before.version != now.version:
        return now
    return msgspec.structs.replace(now, capabilities=before.capabilities | now.capabilities)


def load(text: str | bytes) -> list[Result]:
    """Return the results that a JSON text has, the oldest kernel first."""
    return sorted(msgspec.json.decode(text, type=list[Result]), key=_age)


def _age(result: Result) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", result.version)[:3]]


def _short(version: str) -> str:
    return version.split("-", maxsplit=1)[0]


def render(results: list[Result]) -> str:
    """Return the table: a line for each capability that any has tried, a column for each kernel."""
    tried = {name for each in results for name in each.capabilities}
    names = [name for name in CAPABILITIES if name in tried]
    head = ["", *(_short(each.version) for each in results)]
    rows = [head, ["---"] * len(head)]
    for name in names:
        cells = [str(each.capabilities.get(name, "not tried")) for each in results]
        rows.append([name, *(cell.replace("|", "\\|") for cell in cells)])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def rewrite() -> None:
    """Put the results that are kept beside the kernels into docs/kernels.json, and its table."""
    known = {each.series: each for each in load(RESULTS.read_bytes())} if RESULTS.exists() else {}
    for path in _kept().glob("*.json"):
        each = msgspec.json.decode(path.read_bytes(), type=Result)
        known[each.series] = _joined(known.get(each.series), each)
    results = sorted(known.values(), key=_age)
    value: Any = msgspec.to_builtins(results)
    RESULTS.write_text(json.dumps(value, indent=1) + "\n")
    TABLE.write_text(with_table(TABLE.read_text(), results))


def with_table(text: str, results: list[Result]) -> str:
    """Return the text of a page with the table of *results* between the marks."""
    before, _, rest = text.partition(_MARKS[0])
    after = rest.partition(_MARKS[1])[2]
    return f"{before}{_MARKS[0]}{render(results)}{_MARKS[1]}{after}"


if __name__ == "__main__":
    rewrite()
