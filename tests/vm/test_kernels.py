"""The datapath on other kernels: what loads, attaches and works there, as docs/kernels.md says.

SOCKHOP_VM_KERNELS: series, separated by commas, such as 6.1,6.12,newest.
"""

import os
from typing import NamedTuple

import pytest

from tests.vm.kernels import Kernel, fetch
from tests.vm.machine import Report, run_tests

pytestmark = [pytest.mark.vm, pytest.mark.timeout(3600)]

KERNELS = os.environ.get("SOCKHOP_VM_KERNELS", "6.1,6.12,newest").split(",")

# What a row of the table means: the tests that show it. None of them compiles a mutant.
CAPABILITIES = {
    "agent: load, attach, follow, detach": [
        "tests/agent/test_agent.py::test_a_changed_manifest_is_followed",
        "tests/agent/test_agent.py::test_the_datapath_outlives_the_agent",
        "tests/agent/test_agent.py::test_detach_on_exit",
    ],
    "clients by namespace": ["tests/agent/test_agent.py::test_a_service_for_one_namespace"],
    "clients by cgroup": ["tests/agent/test_agent.py::test_a_service_for_some_cgroups"],
    "algorithms and affinity": [
        "tests/datapath/test_statistics.py::test_round_robin_is_exact",
        "tests/datapath/test_statistics.py::test_maglev_keeps_what_is_bound",
        "tests/datapath/test_choice.py::test_a_client_stays_with_its_backend",
    ],
    "unconnected UDP": [
        "tests/datapath/test_datagrams.py::test_the_answer_comes_from_the_frontend",
        "tests/datapath/test_datagrams.py::test_it_moves_when_its_backend_leaves",
        "tests/datapath/test_datagrams.py::test_one_socket_talks_to_fifty_services",
    ],
    "sockets: list, live counts": [
        "tests/clients/test_socket_edges.py::test_one_udp_socket_connects_to_many",
        "tests/clients/test_socket_edges.py::test_a_udp_socket_that_is_dissolved_has_no_peer",
    ],
    "sever, by iterator": ["tests/datapath/test_ending.py", "-k iterator"],
    "sever, by netlink": ["tests/datapath/test_ending.py", "-k netlink"],
    "audit and heal": [
        "tests/diagnose/test_audit.py::test_live_entries_and_stale_ones",
        "tests/diagnose/test_heal.py::test_the_incident_is_found_and_cured",
    ],
}

# What a kernel may lack, as `sockhop features` there names it; without it that is not to work.
NEEDS = {
    "clients by cgroup": "bpf_rdonly_cast",
    "sever, by iterator": "bpf_sock_destroy",
    "sever, by netlink": "SOCK_DESTROY for TCP",
}


class Run(NamedTuple):
    """A kernel and what the tests said there."""

    kernel: Kernel
    report: Report


@pytest.fixture(scope="module", params=KERNELS)
def run(request: pytest.FixtureRequest) -> Run:
    kernel = fetch(request.param)
    tests = sorted({part for parts in CAPABILITIES.values() for part in parts if "::" in part
                    or part.endswith(".py")})  # fmt: skip
    return Run(kernel, run_tests(kernel, " ".join(tests) + " -k 'not mutant'", seconds=2400))


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
    if NEEDS.get(capability) in run.report.lacking:
        assert bad, "it works without what it needs"
    else:
        assert not bad, run.report.console[-6000:]
