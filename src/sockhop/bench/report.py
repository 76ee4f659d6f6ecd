"""What a benchmark finds, as it stands in its JSON."""

import os
import platform
import statistics
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from sockhop import __version__
from sockhop.bench.messages import Operation
from sockhop.bench.rooms import Cpus
from sockhop.model import Protocol

__all__ = [
    "ConnectReport",
    "Form",
    "Machine",
    "Result",
    "Run",
    "SeverReport",
    "SeverResult",
    "SeverRun",
    "SpliceReport",
    "SpliceResult",
    "Spread",
    "SyncReport",
    "spread_of",
]


class Spread(msgspec.Struct, frozen=True):
    """The median of samples with the quartiles around it."""

    median: float
    lower: float
    upper: float


def spread_of(samples: Sequence[float]) -> Spread:
    """Return the quartiles of at least two samples."""
    lower, median, upper = statistics.quantiles(samples, n=4, method="inclusive")
    return Spread(median, lower, upper)


class Machine(msgspec.Struct, frozen=True):
    """Where a benchmark ran, and when (UTC)."""

    cpu: str
    cpus: int
    client_cpu: int
    server_cpu: int
    memory_mib: int
    kernel: str
    python: str
    sockhop: str
    date: str

    @classmethod
    def here(cls) -> "Machine":
        """This machine, now."""
        cpus = Cpus.ours()
        return cls(
            cpu=_cpu_model(),
            cpus=len(os.sched_getaffinity(0)),
            client_cpu=cpus.client,
            server_cpu=cpus.server,
            memory_mib=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 20,
            kernel=f"{platform.release()} {platform.machine()}",
            python=platform.python_version(),
            sockhop=__version__,
            date=datetime.now(UTC).isoformat(timespec="seconds"),
        )


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            return value.strip()
    return platform.machine()


class Result(msgspec.Struct, frozen=True):
    """One peer's connections of one kind.

    `nanoseconds` are per connection; a sample is the mean of `connections` in a row. The ratios
    are those of samples of the same round: to the direct connection, and to sockhop's.
    """

    operation: Operation
    protocol: Protocol
    peer: str
    connections: int
    nanoseconds: Spread
    to_direct: Spread
    to_sockhop: Spread
    samples: list[float]


class Run(msgspec.Struct, frozen=True):
    """What was measured with one number of services.

    `conntrack_entries`: connections that the kernel tracked for a peer at the end.
    """

    services: int
    dialled: int
    setup_seconds: dict[str, float]
    left_out: dict[str, str]
    conntrack_entries: dict[str, int]
    results: list[Result]


class ConnectReport(msgspec.Struct, frozen=True):
    """`sockhop bench connect`."""

    benchmark: str
    command: list[str]
    machine: Machine
    seed: int
    rounds: int
    backends: int
    versions: dict[str, str]
    runs: list[Run]


class SpliceResult(msgspec.Struct, frozen=True):
    """One peer's messages of one size, connections where `what` is setup, or a program's requests.

    `nanoseconds` by the clock and by the CPU time of both ends together, for each. The ratios are
    those of samples of the same round, plain TCP's time by this one's: above 1 is better.
    """

    what: str
    place: str
    cpus: str
    size: int
    peer: str
    nanoseconds: Spread
    cpu_nanoseconds: Spread
    speed_to_plain: Spread
    per_cpu_to_plain: Spread
    samples: list[list[float]]


class SpliceReport(msgspec.Struct, frozen=True):
    """`sockhop bench splice`. `left_out`: servers that were not measured, and why."""

    benchmark: str
    command: list[str]
    machine: Machine
    rounds: int
    left_out: dict[str, str]
    results: list[SpliceResult]


class Form(msgspec.Struct, frozen=True):
    """What was measured with the same services in one form of manifests.

    `cold`: from starting the agent until a connect reaches the last service's backend. `change`:
    from the rename of the file that has the changed service until a connect reaches its new
    backend. `stages`: what of a cold start, in a process of its own, took how long.
    """

    form: str
    files: int
    bytes: int
    cold_seconds: list[float]
    change_milliseconds: list[float]
    peak_memory_mib: float
    maps_mib: float
    stages: dict[str, float]


class SyncReport(msgspec.Struct, frozen=True):
    """`sockhop bench sync`."""

    benchmark: str
    command: list[str]
    machine: Machine
    services: int
    backends: int
    forms: list[Form]


class SeverResult(msgspec.Struct, frozen=True):
    """One way to end the sockets.

    Of all samples, the fewest `hits` (sockets that had to be ended and were), the most `misses`
    (that were not) and the most `wrong` (ended, but not of a backend that goes). `samples` in
    milliseconds.
    """

    way: str
    milliseconds: Spread
    cpu_milliseconds: Spread
    hits: int
    misses: int
    wrong: int
    samples: list[float]


class SeverRun(msgspec.Struct, frozen=True):
    """Sockets, half TCP and half UDP, in namespaces; `matching` of them are at `backends` that go.

    `direct` more are connected to those without us, and are not to be ended.
    """

    sockets: int
    namespaces: int
    matching: int
    direct: int
    backends: int
    own_tables: bool
    results: list[SeverResult]


class SeverReport(msgspec.Struct, frozen=True):
    """`sockhop bench sever`.

    `change_milliseconds`: from the rename of a manifest to the last of `change_sockets` ended, all
    at one backend that it replaces, by an agent.
    """

    benchmark: str
    command: list[str]
    machine: Machine
    rounds: int
    runs: list[SeverRun]
    change_sockets: int
    change_milliseconds: Spread
