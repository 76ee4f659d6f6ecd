"""`sockhop bench`."""

import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
import msgspec

from sockhop.cli.options import bpffs_path, cgroup_path, global_options
from sockhop.cli.output import table
from sockhop.errors import InputError, SockhopError, SystemLackError

if TYPE_CHECKING:
    from sockhop.bench.report import (
        ConnectReport,
        Form,
        Result,
        Run,
        SeverReport,
        SpliceReport,
        Spread,
        SyncReport,
    )
    from sockhop.bench.rooms import Site

__all__ = ["command"]

R = TypeVar("R")

_QUICK_ROUNDS, _ROUNDS = 5, 41
_SPLICE_ROUNDS = 11
_SIZES = (1, 1_000, 10_000, 100_000)
_MOST = 131_072  # what the maps have room for
_OPERATIONS = {"connect": "connect, close", "ask": "connect, 64 B there and back, close"}


@click.group(epilog="Example: sockhop bench connect --quick --plot connect.svg >connect.json")
@global_options
def command() -> None:
    """Measure sockhop beside its peers, in network namespaces and cgroups of its own.

    Nothing else on this machine is touched. All is removed at the end, also after Ctrl-C. The
    cgroup is made below --cgroup, the pins beside --bpffs. Use an idle machine.
    """


def _options(default_services: int | None) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Add what every benchmark takes: --services, --quick, --output."""
    several = default_services is None

    def add(function: Callable[..., Any]) -> Callable[..., Any]:
        for option in (
            click.option(
                "--services",
                type=click.IntRange(1, _MOST),
                metavar="N",
                multiple=several,
                default=None,
                help="How many services there are; may be given several times "
                "[default: 1, 1000, 10000 and 100000]."
                if several
                else f"How many services there are [default: {default_services}].",
            ),
        ):
            function = option(function)
        return _output_options(function)

    return add


def _output_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add what every benchmark takes: --quick, --output."""
    for option in (
        click.option(
            "--output",
            type=click.Path(dir_okay=False, path_type=Path),
            help="Write the JSON to this file, not to standard output.",
        ),
        click.option("--quick", is_flag=True, help="Fewer and smaller measurements."),
    ):
        function = option(function)
    return global_options(function)


@command.command(
    short_help="Measure what a connection costs.",
    epilog="Example: sockhop bench connect --services 10000 --plot connect.svg",
)
@_options(None)
@click.option(
    "--rounds",
    type=click.IntRange(3, 10_000),
    metavar="N",
    help=f"How many samples are taken of everything [default: {_ROUNDS}].",
)
@click.option(
    "--dialled",
    type=click.IntRange(1),
    metavar="N",
    default=100,
    show_default=True,
    help="How many services of TCP, and of UDP, the clients dial in turn.",
)
@click.option(
    "--seed",
    type=int,
    metavar="N",
    default=1,
    show_default=True,
    help="Which services these are.",
)
@click.option(
    "--plot",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Draw the medians to this SVG file.",
)
def connect(  # noqa: PLR0913, PLR0917 (an argument an option)
    services: tuple[int, ...],
    quick: bool,
    output: Path | None,
    rounds: int | None,
    dialled: int,
    seed: int,
    plot: Path | None,
) -> None:
    """Measure what a connection costs: direct, by sockhop, by nftables, by haproxy.

    Two things, for TCP and UDP: connect and close; and connect, send 64 bytes, receive 64 bytes,
    close. Each peer has a network namespace of its own; they are measured in turn, many times.
    A table goes to standard error, JSON to standard output.
    """
    from sockhop.bench.connect import ConnectPlan, measure_connects  # noqa: PLC0415 (slow)
    from sockhop.bench.plot import draw  # noqa: PLC0415

    plan = ConnectPlan(
        services=services or (_SIZES[:2] if quick else _SIZES),
        rounds=rounds or (_QUICK_ROUNDS if quick else _ROUNDS),
        dialled=dialled,
        seed=seed,
    )
    report = _perform([output, plot], lambda site: measure_connects(site, plan, sys.argv[1:], _say))
    _publish(report, output)
    if plot:
        plot.write_text(draw(report))
    _say(_connect_table(report))


@command.command(
    short_help="Measure the way of manifests into the kernel.",
    epilog="Example: sockhop bench sync --services 10000 --output sync.json",
)
@_options(10_000)
@click.option(
    "--backends",
    type=click.IntRange(1, 1000),
    metavar="N",
    default=10,
    show_default=True,
    help="How many backends each service has.",
)
def sync(services: int | None, quick: bool, output: Path | None, backends: int) -> None:
    """Measure how long services take from manifests into the kernel, and the agent's memory.

    The same services as one JSON file, one YAML file, and directories of a file each: from
    starting the agent until the kernel answers with the last service, and from changing one
    service until the kernel answers with that. A table goes to standard error, JSON to standard
    output.
    """
    from sockhop.bench.sync import SyncPlan, measure_sync  # noqa: PLC0415 (slow)

    plan = SyncPlan(
        services=services or (200 if quick else 10_000),
        backends=backends,
        starts=1 if quick else 3,
        changes=5 if quick else 20,
    )
    report = _perform([output], lambda site: measure_sync(site, plan, sys.argv[1:], _say))
    _publish(report, output)
    _say(_sync_table(report))


@command.command(
    short_help="Measure splicing beside plain TCP.",
    epilog="Example: sockhop bench splice --output splice.json",
)
@_output_options
@click.option(
    "--rounds",
    type=click.IntRange(2, 10_000),
    metavar="N",
    help=f"How many samples are taken of everything [default: {_SPLICE_ROUNDS}].",
)
@click.option(
    "--plot",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Draw the medians to this SVG file.",
)
def splice(quick: bool, output: Path | None, rounds: int | None, plot: Path | None) -> None:
    """Measure splicing beside plain TCP, a sockhash by tuple and Unix sockets.

    Messages there and back, on one CPU and on two, streams, and setting connections up, on loopback
    and between two network namespaces; then Redis, PostgreSQL, nginx and iperf3 under their own
    clients' load, where they are installed. A table goes to standard error, JSON to standard
    output.
    """
    from sockhop.bench.plot_splice import draw_splice  # noqa: PLC0415 (slow)
    from sockhop.bench.programs import LOADS  # noqa: PLC0415
    from sockhop.bench.splice import SplicePlan, measure_splice  # noqa: PLC0415

    plan = SplicePlan(
        rounds=rounds or (2 if quick else _SPLICE_ROUNDS),
        exchanges=(64, 4096) if quick else (1, 64, 1024, 4096, 16384, 65536),
        streams=(16384,) if quick else (1024, 4096, 16384, 65536, 131072),
        loads=LOADS,
    )
    report = _perform([output, plot], lambda site: measure_splice(site, plan, sys.argv[1:], _say))
    _publish(report, output)
    if plot:
        plot.write_text(draw_splice(report))
    _say(_splice_table(report))


@command.command(
    short_help="Measure how long ending sockets takes.",
    epilog="Example: sockhop bench sever --sockets 10000 --output sever.json",
)
@_output_options
@click.option(
    "--sockets",
    type=click.IntRange(100, 200_000),
    metavar="N",
    multiple=True,
    help="How many there are; may be given several times [default: 1000, 10000 and 100000].",
)
@click.option(
    "--namespaces",
    type=click.IntRange(1, 500),
    metavar="N",
    multiple=True,
    help="In how many; may be given several times [default: 1, 10 and 100].",
)
@click.option(
    "--rounds",
    type=click.IntRange(2, 1000),
    metavar="N",
    default=7,
    show_default=True,
    help="How often everything is measured.",
)
def sever(
    sockets: tuple[int, ...],
    namespaces: tuple[int, ...],
    quick: bool,
    rounds: int,
    output: Path | None,
) -> None:
    """Measure how long it takes to end the sockets of backends that are gone.

    1 % of the sockets are at these, in three of the namespaces. By `ss -K` in every namespace, by
    an iterator in every namespace, and by sockhop's two engines; with hash tables that all
    namespaces share and with their own; and with 500 backends at once. And from a change of a
    manifest to the last of 1,000 sockets ended, with an agent. A table goes to standard error, JSON
    to standard output.
    """
    from sockhop.bench.crowd import Shape  # noqa: PLC0415 (slow)
    from sockhop.bench.sever import SeverPlan, measure_severing  # noqa: PLC0415

    counts = sockets or ((1_000,) if quick else _SIZES[1:])
    places = namespaces or ((1, 3) if quick else (1, 10, 100))
    shapes = [
        Shape(count, place, 1, own)
        for own in ((False,) if quick else (False, True))
        for count in counts
        for place in places
    ]
    shapes.append(Shape(max(counts), max(places), 500, own_tables=False))
    plan = SeverPlan(shapes, rounds, change=100 if quick else 1_000)
    report = _perform([output], lambda site: measure_severing(site, plan, sys.argv[1:], _say))
    _publish(report, output)
    _say(_sever_table(report))


def _perform(files: list[Path | None], measure: "Callable[[Site], R]") -> R:
    """Call *measure* with a site of its own, which is removed however that ends."""
    from sockhop.bench.rooms import Site  # noqa: PLC0415 (needs the extension)
    from sockhop.cli.demo_stage import StopRequested, perform  # noqa: PLC0415

    _require_root()
    for file in files:
        if file and not os.access(file.parent, os.W_OK):
            raise InputError(f"{file}: its directory cannot be written to")
    name = f"{bpffs_path().name}-bench"
    site = Site(name, cgroup_path() / name, bpffs_path().with_name(name))
    results: list[R] = []
    left: list[str] = []

    def play() -> None:
        site.build()
        results.append(measure(site))

    with site.claimed():
        try:
            perform(play, lambda: left.extend(site.clear()))
        except StopRequested as stop:
            _say(f"stopped by {signal.Signals(stop.number).name}")
            raise click.exceptions.Exit(128 + stop.number) from None
        finally:
            if left:
                _say("\n".join(["could not be removed:", *left]))
    if left:
        raise SockhopError("not all was removed, see above")
    return results[0]


def _require_root() -> None:
    if os.geteuid() != 0:
        raise SystemLackError("a benchmark needs root")
    if not shutil.which("ip"):
        raise SystemLackError(
            "a benchmark needs `ip`, which is not on PATH", hint="apt-get install iproute2"
        )


def _publish(
    report: "ConnectReport | SeverReport | SpliceReport | SyncReport", output: Path | None
) -> None:
    text = msgspec.json.format(msgspec.json.encode(report), indent=2).decode()
    if output:
        output.write_text(text + "\n")
    else:
        click.echo(text)


def _say(text: str) -> None:
    click.echo(text, err=True)


# --- tables -------------------------------------------------------------------------------------


def _connect_table(report: "ConnectReport") -> str:
    rows = [["SERVICES", "OPERATION", "PROTOCOL", "PEER", "ns", "QUARTILES", "× DIRECT",
             "QUARTILES", "× SOCKHOP"]]  # fmt: skip
    for run in report.runs:
        rows += [_result_row(run, result) for result in run.results]
    lines = [table(rows), "", f"{report.rounds} rounds; {report.machine.cpu}"]
    for run in report.runs:
        lines += [f"{run.services:,} services: without {p}: {r}" for p, r in run.left_out.items()]
    return "\n".join(lines)


def _result_row(run: "Run", result: "Result") -> list[str]:
    return [
        f"{run.services:,}",
        _OPERATIONS[result.operation],
        result.protocol,
        result.peer,
        f"{result.nanoseconds.median:,.0f}",
        _quartiles(result.nanoseconds, ",.0f"),
        f"{result.to_direct.median:.2f}",
        _quartiles(result.to_direct, ".2f"),
        f"{result.to_sockhop.median:.2f}",
    ]


def _quartiles(spread: "Spread", form: str) -> str:
    return f"{spread.lower:{form}} – {spread.upper:{form}}"


def _splice_table(report: "SpliceReport") -> str:
    rows = [["WHAT", "PLACE", "CPUS", "BYTES", "PEER", "ns", "CPU ns", "SPEED × PLAIN", "QUARTILES",
             "PER CPU × PLAIN", "QUARTILES"]]  # fmt: skip
    for result in report.results:
        rows.append(
            [
                result.what,
                result.place,
                result.cpus,
                f"{result.size:,}" if result.size else "",
                result.peer,
                f"{result.nanoseconds.median:,.0f}",
                f"{result.cpu_nanoseconds.median:,.0f}",
                f"{result.speed_to_plain.median:.2f}",
                _quartiles(result.speed_to_plain, ".2f"),
                f"{result.per_cpu_to_plain.median:.2f}",
                _quartiles(result.per_cpu_to_plain, ".2f"),
            ]
        )
    left_out = "".join(f"\n{name}: {why}" for name, why in report.left_out.items())
    return f"{table(rows)}\n\n{report.rounds} rounds; {report.machine.cpu}{left_out}"


def _sync_table(report: "SyncReport") -> str:
    rows = [["MANIFESTS", "FILES", "MiB", "COLD s", "CHANGE ms", "WORST ms", "AGENT MiB",
             "MAPS MiB"]]  # fmt: skip
    steps = [["MANIFESTS", *(step.upper() + " s" for step in report.forms[0].stages)]]
    for form in report.forms:
        rows.append(_form_row(form))
        steps.append([form.form, *(f"{seconds:.2f}" for seconds in form.stages.values())])
    return (
        f"{report.services:,} services, {report.backends:,} backends\n\n{table(rows)}\n\n"
        f"of a cold start:\n{table(steps)}"
    )


def _form_row(form: "Form") -> list[str]:
    from statistics import median  # noqa: PLC0415 (slow)

    return [
        form.form,
        f"{form.files:,}",
        f"{form.bytes / 2**20:.1f}",
        f"{median(form.cold_seconds):.2f}",
        f"{median(form.change_milliseconds):.0f}",
        f"{max(form.change_milliseconds):.0f}",
        f"{form.peak_memory_mib:.0f}",
        f"{form.maps_mib:.0f}",
    ]


def _sever_table(report: "SeverReport") -> str:
    rows = [["SOCKETS", "NAMESPACES", "TABLES", "BACKENDS", "BY", "ms", "QUARTILES", "CPU ms",
             "HITS", "MISSES", "WRONG"]]  # fmt: skip
    for run in report.runs:
        rows += [
            [
                f"{run.sockets:,}",
                f"{run.namespaces:,}",
                "own" if run.own_tables else "shared",
                f"{run.backends:,}",
                result.way,
                f"{result.milliseconds.median:,.1f}",
                _quartiles(result.milliseconds, ",.1f"),
                f"{result.cpu_milliseconds.median:,.1f}",
                f"{result.hits:,}",
                f"{result.misses:,}",
                f"{result.wrong:,}",
            ]
            for result in run.results
        ]
    change = report.change_milliseconds
    return (
        f"{table(rows)}\n\n{report.rounds} rounds; {report.machine.cpu}\n"
        f"from a change of a manifest to the last of {report.change_sockets:,} sockets ended: "
        f"{change.median:,.0f} ms ({_quartiles(change, ',.0f')})"
    )
