"""The datapath on other kernels: what loads, attaches and works there, as docs/kernels.md says.

SOCKHOP_VM_KERNELS: series, separated by commas, such as 5.10,6.1,newest.
"""

import os
import re
from collections.abc import Iterable
from typing import NamedTuple

import pytest

from tests.vm.capabilities import CAPABILITIES, NEEDS, PARTS
from tests.vm.kernels import Kernel, fetch
from tests.vm.machine import Report, run_tests
from tests.vm.results import Capability, Result, record

pytestmark = [pytest.mark.vm, pytest.mark.timeout(3600)]

KERNELS = os.environ.get("SOCKHOP_VM_KERNELS", "5.10,6.1,6.12,newest").split(",")

_MOST = 6
"""So many messages of failed tests stand in a cell."""


class Run(NamedTuple):
    """A kernel and what the tests said there."""

    kernel: Kernel
    report: Report


@pytest.fixture(scope="module", params=KERNELS)
def run(request: pytest.FixtureRequest) -> Run:
    kernel = fetch(request.param)
    chosen = [each for each in CAPABILITIES if each in _selected(request.session.items)]
    tests = list(dict.fromkeys(
        part for each in chosen for part in CAPABILITIES[each] if not part.startswith("-k ")
    ))  # fmt: skip
    done = Run(kernel, run_tests(kernel, " ".join(tests) + " -k 'not mutant'", seconds=2400))
    if done.report.status is not None:
        shown = summary(done.report, chosen)
        record(Result(request.param, kernel.version, done.report.lacking, shown))
    return done


def _selected(items: Iterable[pytest.Item]) -> set[str]:
    """Return the capabilities that pytest was asked for."""
    calls = (getattr(item, "callspec", None) for item in items)
    return {call.params["capability"] for call in calls if call and "capability" in call.params}


def summary(report: Report, chosen: Iterable[str]) -> dict[str, Capability]:
    """Return what a run shows for these capabilities."""
    found = {}
    for name in chosen:
        tests = outcomes(report, name)
        bad = [test for test, outcome in tests.items() if outcome != "PASSED"]
        needs = [each for each in NEEDS.get(name, ()) if each in report.lacking]
        if needs and bad and name not in PARTS:
            why = f"no {needs[0]} ({report.lacking[needs[0]]})"
            found[name] = Capability(0, len(tests), why)
            continue
        said = dict.fromkeys(_brief(report.messages.get(test, "failed")) for test in bad)
        found[name] = Capability(len(tests) - len(bad), len(tests), "; ".join(list(said)[:_MOST]))
    return found


def _brief(message: str) -> str:
    """Return what pytest says of an error, without its class and the run's own directory."""
    return re.sub(r" with the pins in [^:]*", "", re.sub(r"^sockhop[\w.]+: ", "", message))


def outcomes(report: Report, capability: str) -> dict[str, str]:
    """Return the outcomes of the tests that show a capability."""
    *where, last = CAPABILITIES[capability]
    word = last.removeprefix("-k ") if last.startswith("-k ") else ""
    where = where if word else [*where, last]
    return {
        name: outcome
        for name, outcome in report.outcomes.items()
        if any(name.startswith(prefix) for prefix in where) and word in name
    }


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_it_works_there(run: Run, capability: str) -> None:
    found = outcomes(run.report, capability)
    print(f"{run.kernel.release}: {capability}: {len(found)} tests")
    assert found, run.report.console[-3000:]
    bad = {name: outcome for name, outcome in found.items() if outcome != "PASSED"}
    if any(need in run.report.lacking for need in NEEDS.get(capability, ())):
        assert bad, "it works without what it needs"
    else:
        assert not bad, run.report.console[-6000:]
