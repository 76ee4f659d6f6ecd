"""`sockhop doctor`."""

import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import click

from sockhop.cli.options import bpffs_path, global_options, output_option, parse_duration
from sockhop.cli.output import Column, counted, print_rows, print_value
from sockhop.cli.target import dial_options, namespace_at, parse_question
from sockhop.errors import InputError

if TYPE_CHECKING:
    from sockhop.diagnose.dial import Question
    from sockhop.diagnose.doctor import Diagnosis
    from sockhop.diagnose.matrix import Origin

__all__ = ["command"]

_PLAIN = r"/[A-Za-z0-9/_.~%?=+,:@-]*"
_LAST = 3
"""So many lines of kubelet's log are shown."""
_BACKEND = Column("BACKEND", "backend")
_COLUMNS = (
    Column("FROM", "origin"),
    Column("CONNECTIONS", "attempts"),
    Column("FAILED", "failed"),
    Column("PERCENT", "percent"),
    Column(
        "RESULTS",
        "results",
        text=lambda found: ", ".join(f"{n} {result}" for result, n in found.items()),
    ),
)


@click.command(epilog="Example: sockhop doctor 10.0.1.7:8080 --http /health")
@click.argument("target", metavar="ADDRESS:PORT", required=False)
@dial_options(
    http="Ask for this path on each connection.",
    origin="Dial from",
    also="`all`: all that lead there.",
    counted="Connections from each place.",
    count=5,
    timeout="How long a connection, and an answer, may take.",
)
@click.option(
    "--remote",
    "remotes",
    multiple=True,
    metavar="COMMAND",
    help="Dial from elsewhere, too: this command, such as 'ssh node2', runs there sockhop or else "
    "curl; may be given several times.",
)
@click.option(
    "--kubelet-log",
    "logs",
    multiple=True,
    type=click.Path(path_type=Path, exists=True),
    metavar="PATH",
    help="Where kubelet's log is: a file, or a journal's directory or file; may be given several "
    "times [default: the usual files, and the journal].",
)
@click.option("--alone", is_flag=True, help="Do not dial from other places, too, if one fails.")
@click.option(
    "--watch",
    "watching",
    is_flag=True,
    help="Go on looking whether any connection of this node is harmed; dials nothing.",
)
@click.option(
    "--every",
    default="10s",
    show_default=True,
    metavar="DURATION",
    callback=parse_duration,
    help="Time between two looks of --watch.",
)
@click.option("--looks", type=click.IntRange(2), metavar="N", help="Stop --watch after N looks.")
@output_option
@global_options
def command(  # noqa: PLR0913, PLR0917 (click passes them by name)
    target: str | None,
    http: str | None,
    origins: tuple[str, ...],
    remotes: tuple[str, ...],
    logs: tuple[Path, ...],
    alone: bool,
    count: int,
    timeout: float,
    watching: bool,
    every: float,
    looks: int | None,
    output: str,
) -> int:
    """Say why connections to a TCP address fail or hang.

    Makes fresh connections, as a health check does, with a request on each if --http is given;
    looks at both ends of one that hangs, at the server's queue, at sockmaps, at our own services;
    dials from other places, too, if one fails, and looks into kubelet's log; and says what is
    wrong, what shows it and what to do. Exit status 1 if a connection fails.

    With --watch it tells what begins to harm connections of this node, and what is over, as the
    agent does by itself (`sockhop agent --watch-every`, `sockhop status`, `sockhop events`).
    Something counts when two looks in a row have seen it. Exit status 1 if it harms at the end.
    """
    if watching:
        if target or http or origins or remotes:
            raise InputError("--watch looks at the whole node: no address goes with it")
        from sockhop.cli.doctor_watch import watch  # noqa: PLC0415 (slow to import)

        return watch(every, looks, output)
    if target is None:
        raise InputError("which address? ADDRESS:PORT, or --watch for the whole node")
    from sockhop.diagnose.doctor import diagnose  # noqa: PLC0415 (slow to import)

    question = _question(target, http, count, timeout, remote=bool(remotes))
    found = diagnose(
        question,
        _origins(origins, question),
        bpffs_path(),
        remotes=[_words(each) for each in remotes],
        logs=logs or None,
        alone=alone,
    )
    if output in ("json", "yaml"):
        print_value(found, output)
    else:
        _print(found, output)
    return int(found.fails)


def _question(
    target: str, path: str | None, count: int, timeout: float, *, remote: bool
) -> "Question":
    question = parse_question(target, path, count, timeout)
    if path is not None and remote and not re.fullmatch(_PLAIN, path):
        raise InputError(
            f"--http: {path!r} could mean something to a shell, which --remote may go through",
            hint="write such characters as %26 (&), %3B (;) ...",
        )
    return question


def _words(command: str) -> list[str]:
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise InputError(f"--remote {command!r}: {error}") from None
    if not words:
        raise InputError("--remote: this is no command", hint="for example --remote 'ssh node2'")
    return words


def _origins(names: tuple[str, ...], question: "Question") -> "list[Origin]":
    from sockhop.diagnose.matrix import Origin  # noqa: PLC0415
    from sockhop.diagnose.topology import Topology, name_of  # noqa: PLC0415
    from sockhop.kernel.namespaces import Namespaces  # noqa: PLC0415

    found = [] if names else [Origin("here", None)]
    for name in names:
        if name == "all":
            ways = Topology(Namespaces().all(), question.address)
            found += [Origin(name_of(each), each) for each in ways.owners() + ways.sources()]
            continue
        found.append(Origin(name, namespace_at(name)))
    return found


def _print(found: "Diagnosis", output: str) -> None:
    if where := _where(found):
        click.echo("\n".join((*where, "")))
    print_rows(found.dialled, _COLUMNS, output)
    if found.backends:
        click.echo()
        print_rows(found.backends, (_BACKEND, *_COLUMNS), output)
    for each in found.conclusions:
        click.echo(
            f"\n{each.cause} (from {each.origin}; layer: {each.layer})\n"
            f"  {each.because}\n  do: {each.advice}"
        )
    _print_lines("what else was seen:", found.evidence)
    if found.kubelet:
        number = len(found.kubelet)
        _print_lines(f"kubelet has logged {counted(number, 'failed probe')}, the last:",
                     found.kubelet[-_LAST:])  # fmt: skip
    if not any(each.failed for each in found.dialled):
        number = sum(each.attempts for each in found.dialled)
        click.echo(f"\nnothing is wrong: {counted(number, 'connection')} of {number:,} succeed")


def _where(found: "Diagnosis") -> list[str]:
    """Return what is known of the target's address, and of the way there."""
    ways = [f"way: {way}" for way in found.ways]
    if found.service:
        return [f"{found.target} is a frontend of {found.service}", *ways]
    if found.owners:
        owners = ", ".join(map(str, found.owners[:5])) + (", ..." if len(found.owners) > 5 else "")
        return [f"{found.target} is an address of network namespace {owners}", *ways]
    if found.loopback:
        return ways
    return [f"{found.target} is an address of no network namespace of this node", *ways]


def _print_lines(title: str, lines: list[str]) -> None:
    if lines:
        click.echo("\n".join(("", title, *(f"  {line}" for line in lines))))
