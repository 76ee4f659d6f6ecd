"""A small `sockhop bench splice` measures every peer and leaves nothing behind."""

from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import pytest

from sockhop.bench.plot_splice import draw_splice
from sockhop.bench.programs import LOADS, missing, prepare, run_load, serve
from sockhop.bench.rooms import Site
from sockhop.bench.splice import SplicePlan, measure_splice
from sockhop.errors import SockhopError
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
    loads = [load for load in LOADS if load.name == "redis-benchmark -c 20"]
    plan = SplicePlan(rounds=2, exchanges=(64,), streams=(), loads=loads)
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
        ("redis-benchmark -c 20", "loopback", "two CPUs"): peers,
    }
    drawn = ElementTree.fromstring(draw_splice(report))
    bars = [each for each in drawn.iter() if each.tag.endswith("rect") and len(each)]
    assert len(bars) == sum(result.peer != "plain TCP" for result in report.results)
    # Spliced at all: by far quicker on one CPU, whatever else runs.
    quicker = {r.peer: r.per_cpu_to_plain.median for r in report.results if r.cpus == "one CPU"}
    assert quicker["sockhop"] > 1.2
    assert not Path("/sys/fs/bpf", site.name, "links", "sock_ops").exists()


def test_every_server_is_measured(site: Site) -> None:
    loads = {load.server: load for load in LOADS}
    assert loads.keys() == {"redis", "postgres", "nginx", "iperf3"}
    with site.room("plain") as room:
        for server, load in loads.items():
            assert not missing(server)
            prepare(server, site.directory)
            serve(server, room, site.directory)
            by_clock, of_cpu = run_load(load, room)
            assert 100 < by_clock < 1e8
            assert 100 < of_cpu < 1e8


def test_every_load_is_read() -> None:
    said = {
        "redis-benchmark -c 20": '"test","rps","avg_latency_ms"\n"GET","40000.00","0.1"\n',
        "pgbench -S -c 4": "number of transactions actually processed: 500\ntps = 1000.5 (without",
        "wrk to nginx, short": "  900 requests in 1.10s, 1.1MB read\nRequests/sec:    818.2\n",
        "iperf3": '{"end": {"sum_received": {"bytes": 1310720, "seconds": 1.0}}}',
    }
    found = {load.name: load.read(said[load.name]) for load in LOADS if load.name in said}
    assert {name: (count, round(seconds, 1)) for name, (count, seconds) in found.items()} == {
        "redis-benchmark -c 20": (20_000, 0.5),
        "pgbench -S -c 4": (500, 0.5),
        "wrk to nginx, short": (900, 1.1),
        "iperf3": (10, 1.0),
    }


def test_a_client_that_saw_errors_measures_nothing() -> None:
    (load,) = (load for load in LOADS if load.name == "wrk to nginx, short")
    with pytest.raises(SockhopError, match="a client saw errors"):
        load.read("  9 requests in 1.10s\n  Socket errors: connect 0, read 3\nRequests/sec: 8.2\n")


def test_what_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert missing("redis") == "not installed: apt-get install redis-server redis-tools"
    assert missing("postgres") == "not installed: apt-get install postgresql"
