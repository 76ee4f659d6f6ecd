"""`sockhop bench sever`: ending the sockets of backends that are gone, by several ways."""

import os
import resource
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from sockhop.bench.change import measure_change
from sockhop.bench.crowd import PORT, Crowd, Shape
from sockhop.bench.report import Machine, SeverReport, SeverResult, SeverRun, spread_of
from sockhop.bench.rooms import Site, prefer
from sockhop.datapath.end_by_iterator import IteratorMethod
from sockhop.datapath.ending import EngineName, choose_engine
from sockhop.datapath.listing import list_here
from sockhop.datapath.sockets import CONNECTED, Sockets
from sockhop.kernel import netns
from sockhop.kernel.namespaces import Namespaces

__all__ = ["SeverPlan", "measure_severing"]

_SS_MOST = 500
"""Conditions of one command line of ss."""

Way = Callable[[], object]


class SeverPlan(NamedTuple):
    """What to measure: each shape, `rounds` times by each way; a change of so many sockets."""

    shapes: Sequence[Shape]
    rounds: int
    change: int


def measure_severing(
    site: Site, plan: SeverPlan, command: list[str], say: Callable[[str], None]
) -> SeverReport:
    """Measure as *plan* says, in this process; *say* hears how it goes."""
    prefer(os.getpid())
    say(f"{plan.change:,} sockets and an agent: a backend goes")
    change = spread_of(measure_change(site, plan.change, plan.rounds))
    return SeverReport(
        benchmark="sever",
        command=command,
        machine=Machine.here(),
        rounds=plan.rounds,
        runs=[_measure(site, shape, plan.rounds, say) for shape in plan.shapes],
        change_sockets=plan.change,
        change_milliseconds=change,
    )


def _measure(site: Site, shape: Shape, rounds: int, say: Callable[[str], None]) -> SeverRun:
    tables = "of their own" if shape.own_tables else "shared"
    say(f"{shape.sockets:,} sockets in {shape.namespaces} namespaces, hash tables {tables}, "
        f"{shape.backends} backends go")  # fmt: skip
    crowd = Crowd(site, shape)
    with crowd.gathered(), ExitStack() as stack:
        ways = _ways(crowd, stack)
        samples: dict[str, list[_Sample]] = {name: [] for name in ways}
        for number in range(rounds + 1):
            for name, way in ways.items():
                crowd.reopen()
                sample = _sample(crowd, way)
                if number:  # the first round warms up
                    samples[name].append(sample)
    return SeverRun(
        sockets=shape.sockets,
        namespaces=shape.namespaces,
        matching=shape.matching,
        direct=shape.direct,
        backends=shape.backends,
        own_tables=shape.own_tables,
        results=[_result(name, found) for name, found in samples.items()],
    )


class _Sample(NamedTuple):
    """What one way did: seconds, those of the CPU, and how many sockets of which kind it ended."""

    seconds: float
    cpu: float
    hits: int
    misses: int
    wrong: int


def _sample(crowd: Crowd, way: Way) -> _Sample:
    before = _others(crowd)
    begin, begin_cpu = time.perf_counter(), _cpu()
    way()
    seconds, cpu = time.perf_counter() - begin, _cpu() - begin_cpu
    with Sockets(crowd.site.pins) as sockets:
        misses = len(sockets.of_pairs(crowd.pairs))
    hits = crowd.shape.matching - misses
    return _Sample(seconds, cpu, hits, misses, before - _others(crowd) - hits)


def _others(crowd: Crowd) -> int:
    """Count the connected sockets that are held in the namespaces with sockets that go."""
    count = 0
    for name in crowd.names[:3]:
        with netns.entered(Path("/run/netns") / name):
            count += sum(each.is_open for each in list_here(states=CONNECTED))
    return count


def _cpu() -> float:
    uses = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(use.ru_utime + use.ru_stime for use in uses)


def _ways(crowd: Crowd, stack: ExitStack) -> dict[str, Way]:
    pins, pairs = crowd.site.pins, crowd.pairs
    iterator = stack.enter_context(choose_engine(pins, EngineName.ITERATOR))
    netlink = stack.enter_context(choose_engine(pins, EngineName.NETLINK))
    everywhere = IteratorMethod(pins)
    stack.callback(everywhere.close)
    inodes = [netns.inode(Path("/run/netns") / name) for name in crowd.names]
    places = Namespaces().by_inode(inodes)
    peers = [f"dst {each.address}:{PORT}" for each in crowd.doomed]
    expressions = [
        " or ".join(peers[first : first + _SS_MOST]) for first in range(0, len(peers), _SS_MOST)
    ]

    def ss() -> None:
        for name in crowd.names:
            for expression in expressions:
                subprocess.run(
                    ["ss", "-N", name, "-KHntu", "state", "connected", *expression.split()],
                    stdout=subprocess.DEVNULL,
                    check=True,
                )

    return {
        "ss -K in every namespace": ss,
        "iterator in every namespace": lambda: everywhere.end_pairs(pairs, {}, places),
        "sockhop, iterator": lambda: iterator.sever_pairs(pairs),
        "sockhop, netlink": lambda: netlink.sever_pairs(pairs),
    }


def _result(name: str, samples: Sequence[_Sample]) -> SeverResult:
    return SeverResult(
        way=name,
        milliseconds=spread_of([each.seconds * 1e3 for each in samples]),
        cpu_milliseconds=spread_of([each.cpu * 1e3 for each in samples]),
        hits=min(each.hits for each in samples),
        misses=max(each.misses for each in samples),
        wrong=max(each.wrong for each in samples),
        samples=[round(each.seconds * 1e3, 3) for each in samples],
    )
