"""`sockhop advisories`."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import click
import msgspec

from sockhop.cli.options import global_options, output_option
from sockhop.cli.output import Column, counted, print_rows, print_value
from sockhop.errors import InputError, SystemLackError

if TYPE_CHECKING:
    from sockhop.kernel.advisories import Advisory

__all__ = ["command", "report_on"]

_COLUMNS = (
    Column("FAULT", "fault"),
    Column("AFFECTED", "affected"),
    Column("EFFECT", "effect"),
    Column("CONCERNS", "concerns"),
    Column("FROM", "introduced", wide=True),
    Column("FIXED IN", "fixed", wide=True),
    Column("WHAT", "title"),
)


class _Row(msgspec.Struct):
    """`affected`: yes or no where it was tried, by version: perhaps; unknown."""

    fault: str
    affected: str
    effect: str
    concerns: str
    introduced: tuple[str, ...]
    fixed: tuple[str, ...]
    title: str


class _Tried(msgspec.Struct):
    """What was tried on the running kernel: the fault that was found, why it was not tried."""

    what: str
    found: str = ""
    not_tried: str = ""


class _Report(msgspec.Struct):
    """`vendor`: the kernel is not one of kernel.org, so that its version proves nothing."""

    kernel: str
    vendor: bool
    faults: list[_Row]
    tried: list[_Tried]


@click.command(epilog="Example: sockhop advisories --kernel 5.10.134-16.al8")
@click.option(
    "--kernel",
    metavar="VERSION",
    help="Look a version up, as `uname -r` prints it, and try nothing. Needs no root.",
)
@output_option
@global_options
def command(kernel: str | None, output: str) -> int:
    """List known faults of this kernel in what sockhop and other users of sockmaps rely on.

    Versions only suspect: vendors move fixes, and faults, to other versions. So on the running
    kernel what can be tried is tried, with sockets of our own; nothing is attached to a cgroup.
    Exit status 1 if a fault is suspected or seen.
    """
    report = report_on(kernel)
    if output in ("json", "yaml"):
        print_value(report, output)
    else:
        _print(report, output, given=kernel is not None)
    wrong = [row for row in report.faults if row.affected != "unknown"]
    return int(bool(wrong) or any(each.found for each in report.tried))


def report_on(kernel: str | None) -> _Report:
    """Return the known faults of the release *kernel*, or of this kernel, on which it tries."""
    from sockhop.kernel.advisories import (  # noqa: PLC0415 (reads the data)
        advisories,
        is_affected,
        is_upstream,
        parse_release,
        running_release,
    )

    release = running_release() if kernel is None else kernel
    version = parse_release(release)
    if not version[0]:
        raise InputError(
            f"--kernel {release}: this is no kernel version",
            hint="name one as `uname -r` prints it, such as 6.1.176 or 5.10.134-16.al8",
        )
    seen, tried = _try() if kernel is None else ({}, [])
    said = {None: "unknown", True: "perhaps", False: ""}
    rows = [
        _row(advisory, affected)
        for advisory in advisories()
        if (affected := seen.get(advisory.name, said[is_affected(advisory, version)]))
        not in ("", "no")
    ]
    rows.sort(key=lambda row: (_ORDER.index(row.affected), not row.effect))
    return _Report(release, not is_upstream(release), rows, tried)


_ORDER = ("yes", "perhaps", "unknown")


def _row(advisory: "Advisory", affected: str) -> _Row:
    return _Row(
        advisory.name,
        affected,
        advisory.effect,
        advisory.used_by,
        advisory.introduced,
        advisory.fixed,
        advisory.title,
    )


def _try() -> tuple[dict[str, str], list[_Tried]]:
    """Return what was seen, by the advisory's name, and what was tried."""
    from sockhop.datapath.splicecheck import (  # noqa: PLC0415 (needs the extension)
        check_splicing,
        entries_outlive_connections,
    )

    seen = {}

    def outlive() -> str:
        stays = entries_outlive_connections()
        seen["SOCKHOP-2"] = "yes" if stays else "no"
        return "it does: a map by addresses gets stale entries (SOCKHOP-2)" if stays else ""

    trials: tuple[tuple[str, Callable[[], str]], ...] = (
        ("redirected bytes arrive whole, survive a reset; a close is noticed", check_splicing),
        ("a reset socket stays in a sockhash until it is closed", outlive),
    )
    tried = []
    for what, trial in trials:
        try:
            tried.append(_Tried(what, trial()))
        except SystemLackError as error:
            tried.append(_Tried(what, not_tried=error.message))
    return seen, tried


def _print(report: _Report, output: str, *, given: bool) -> None:
    click.echo(f"kernel {report.kernel}")
    if report.faults:
        click.echo()
        print_rows(report.faults, _COLUMNS, output)
    click.echo()
    suspected = sum(row.affected != "unknown" for row in report.faults)
    if any(row.effect == "stale" and row.affected != "unknown" for row in report.faults):
        click.echo(
            "stale: entries of sockmaps stay behind, and a new connection with the same ends is "
            "established\nand hangs: `sockhop audit` finds them, `sockhop heal` deletes them"
        )
    click.echo(f"{counted(suspected, 'fault')} suspected by version or seen")
    if report.vendor:
        click.echo(
            "note: this is a vendor's kernel: fixes and faults may have been moved to it, so that "
            "its version proves nothing"
            + (": run `sockhop advisories` on it, which tries what can be tried" if given else "")
        )
    for each in report.tried:
        if each.not_tried:
            click.echo(f"not tried: {each.what}: {each.not_tried}")
        else:
            click.echo(f"tried: {each.what}: {each.found or 'no fault'}")
