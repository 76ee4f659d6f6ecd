"""A small `sockhop bench splice` measures every peer and leaves nothing behind."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from sockhop.bench.rooms import Site
from sockhop.bench.splice import SplicePlan, measure_splice
from tests.sandbox import Sandbox

pytestmark = [
    pytest.mark.kernel,
    # The workers' pipes go with the process, which otherwise is a command of its own.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture
def site(sandbox: Sandbox) -> Iterator[Site]:
    made = Site(f"{sandbox.name}-bench", sandbox.cgroup.with_name(f"{sandbox.name}-bench"),
                sandbox.pins.with_name(f"{sandbox.name}-bench"))  # fmt: skip
    made.build()
    try:
        yield made
    finally:
        assert not made.clear()


def test_every_peer_is_measured(site: Site) -> None:
    plan = SplicePlan(rounds=2, exchanges=(64,), streams=())
    report = measure_splice(site, plan, [], lambda _: None)
    peers = {"plain TCP", "plain TCP, again", "sockhop", "sockmap by tuple"}
    seen = {(r.what, r.place, r.cpus): set[str]() for r in report.results}
    for result in report.results:
        seen[result.what, result.place, result.cpus].add(result.peer)
        assert result.nanoseconds.median > 0
        assert len(result.samples) == 2
    assert seen == {
        ("exchange", "loopback", "one CPU"): peers | {"Unix socket"},
        ("exchange", "loopback", "two CPUs"): peers | {"Unix socket"},
        ("exchange", "veth", "one CPU"): peers,
        ("exchange", "veth", "two CPUs"): peers,
        ("setup", "loopback", "two CPUs"): peers,
    }
    # Spliced at all: by far quicker on one CPU, whatever else runs.
    quicker = {r.peer: r.per_cpu_to_plain.median for r in report.results if r.cpus == "one CPU"}
    assert quicker["sockhop"] > 1.2
    assert not Path("/sys/fs/bpf", site.name, "links", "sock_ops").exists()
