"""`sockhop heal`."""

import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import click
import msgspec

from sockhop.cli.options import api_path, bpffs_path, global_options, output_option
from sockhop.cli.output import Column, print_rows, print_value
from sockhop.cli.sockmap_options import (
    chosen_maps,
    given_layout,
    print_pairs,
    sockmap_options,
    stale_entries,
)

if TYPE_CHECKING:
    from sockhop.diagnose.heal import Healed, Severed

__all__ = ["command"]


class _Row(msgspec.Struct):
    """An entry and its outcome, as a row of a table."""

    outcome: str
    local: str
    remote: str
    state: str
    lost: str
    map: int
    processes: list[str]
    key: str


_COLUMNS = (
    Column("ACTION", "outcome"),
    Column("LOCAL", "local"),
    Column("REMOTE", "remote"),
    Column("STATE", "state"),
    Column("UNREAD", "lost"),
    Column("MAP", "map"),
    Column("HELD-BY", "processes"),
    Column("KEY", "key", wide=True),
)


@click.command(epilog="Example: sockhop heal --id 122 --yes")
@sockmap_options
@click.option("--yes", is_flag=True, help="Do it. Without this nothing is changed.")
@click.option(
    "--lose-unread",
    is_flag=True,
    help="Also where spliced bytes are unread: they are lost with the entry.",
)
@click.option(
    "--sever-victims",
    is_flag=True,
    help="End the half-spliced connections; else they are freed for what is sent from then on.",
)
@output_option
@global_options
def command(  # noqa: PLR0913, PLR0917 (click passes them by name)
    every: bool,
    number: int | None,
    pinned: Path | None,
    key: str | None,
    wait: float,
    yes: bool,
    lose_unread: bool,
    sever_victims: bool,
    output: str,
) -> int:
    """Delete the stale entries that are in the way of other connections.

    An entry goes only if two looks, --wait apart, call it stale, if it still is when it is deleted,
    and if its socket has no unread spliced bytes. Bytes that were sent to the wrong socket do not
    come back: a request that hangs is best ended (--sever-victims), its client will ask again.
    Maps whose keys name no connection are left alone. Each action is an event. Exit status 0 if
    nothing is stale any more, 1 if something is.
    """
    from sockhop.diagnose import heal as healing  # noqa: PLC0415 (slow to import)
    from sockhop.diagnose.pairs import examine  # noqa: PLC0415
    from sockhop.diagnose.visit import Visitor  # noqa: PLC0415

    severed: list[Severed] = []
    with ExitStack() as stack:
        maps = chosen_maps(stack, every=every, number=number, pinned=pinned, key=key)
        visitor = stack.enter_context(Visitor())
        audits, pairs = examine(visitor, maps, given_layout(key), wait=wait)
        done = (healing.heal if yes else healing.plan)(audits, lose_unread=lose_unread)
        if yes and sever_victims:
            severed = healing.sever_victims(pairs, bpffs_path())
    if yes:
        _record(done, severed)
    hints = healing.advice(done)
    if output in ("json", "yaml"):
        print_value({"entries": done, "pairs": pairs, "severed": severed, "advice": hints}, output)
    else:
        _print(done, output)
        print_pairs(pairs, output)
        for each in severed:
            click.echo(f"{each.outcome}: the half-spliced {each.local}>{each.remote}")
        for hint in hints:
            click.echo(f"note: {hint}")
        _conclude(done, yes=yes)
    return int(any(each.outcome.is_left for each in done))


def _print(done: "list[Healed]", output: str) -> None:
    rows = [
        _Row(
            outcome=each.outcome + (f" ({each.reason})" if each.reason else ""),
            local=each.entry.local,
            remote=each.entry.remote,
            state=each.entry.state,
            lost=f"{each.lost}{'+' * each.more}",
            map=each.map,
            processes=each.processes,
            key=each.entry.key,
        )
        for each in done
    ]
    if rows:
        print_rows(rows, _COLUMNS, output)


def _conclude(done: "list[Healed]", *, yes: bool) -> None:
    from sockhop.diagnose.heal import Outcome  # noqa: PLC0415

    unread = [each for each in done if each.outcome is Outcome.UNREAD]
    if not done:
        click.echo("no stale entry is in anybody's way: there is nothing to heal")
        return
    if unread:
        click.echo(
            f"{stale_entries(len(unread))} left because of unread bytes: --lose-unread deletes "
            "also those, and the bytes"
        )
    if yes:
        deleted = sum(each.outcome is Outcome.DELETED for each in done)
        click.echo(f"{deleted:,} of {stale_entries(len(done))} deleted")
    else:
        click.echo("nothing was changed: --yes does it")


def _record(done: "list[Healed]", severed: "list[Severed]") -> None:
    from sockhop.agent.events import Event, EventKind, EventLog, events_path  # noqa: PLC0415
    from sockhop.diagnose.heal import Outcome  # noqa: PLC0415

    now = time.time()
    events = [
        Event(
            time=now,
            kind=EventKind.HEALED if each.outcome is Outcome.DELETED else EventKind.REFUSED,
            reason=f"heal: entry of map {each.map} ({each.name}), {each.entry.state}: "
            f"{each.outcome}" + (f", {each.lost} unread bytes lost" if each.lost else ""),
            protocol="TCP",
            local=each.entry.local,
            remote=each.entry.remote,
            cookie=each.entry.cookie,
            netns=each.entry.netns,
            processes=each.processes,
        )
        for each in done
        if each.outcome in (Outcome.DELETED, Outcome.REFUSED)
    ]
    events += [
        Event(
            time=now,
            kind=EventKind.SEVERED if each.outcome == "severed" else EventKind.REFUSED,
            reason=f"heal: half-spliced{': ' * bool(each.reason)}{each.reason}",
            protocol="TCP",
            local=each.local,
            remote=each.remote,
            cookie=each.cookie,
            netns=each.netns,
            processes=each.processes,
        )
        for each in severed
        if each.outcome != "gone"
    ]
    EventLog(events_path(api_path())).append(events)
