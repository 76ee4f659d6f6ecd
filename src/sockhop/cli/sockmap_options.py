"""What `audit` and `heal` have in common: which maps, how their keys are laid out, how long."""

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from sockhop.cli.options import parse_period
from sockhop.cli.output import Column, counted, print_rows
from sockhop.errors import InputError

if TYPE_CHECKING:
    from sockhop.diagnose.keys import KeyLayout
    from sockhop.diagnose.pairs import PairCheck, Side
    from sockhop.diagnose.visit import OpenMap

__all__ = ["chosen_maps", "given_layout", "print_pairs", "sockmap_options", "stale_entries"]

F = TypeVar("F", bound=Callable[..., Any])

_QUEUED = (
    Column("LOCAL", "local"),
    Column("REMOTE", "remote"),
    Column("STATE", "state"),
    Column("SPLICED", "spliced"),
    Column("STACK", "stack"),
    Column("PROCESSES", "processes"),
    Column("NETNS", "netns", wide=True),
)


def sockmap_options(command: F) -> F:
    """Add --all, --id, --pinned, --key and --wait."""
    for option in (
        click.option(
            "--wait",
            default="1s",
            show_default=True,
            metavar="DURATION",
            callback=parse_period,
            help="Time between the two looks.",
        ),
        click.option(
            "--key",
            metavar="LAYOUT",
            help="How the keys are laid out, for example 'sip:4 dip:4 sport:2be dport:2be'.",
        ),
        click.option(
            "--pinned",
            type=click.Path(path_type=Path),
            metavar="PATH",
            help="Only the map that is pinned here.",
        ),
        click.option("--id", "number", type=int, metavar="N", help="Only the map with this id."),
        click.option("--all", "every", is_flag=True, help="All maps [the default]."),
    ):
        command = option(command)
    return command


def given_layout(key: str | None) -> "KeyLayout | None":
    """Return the layout of --key."""
    from sockhop.diagnose.keys import parse_key  # noqa: PLC0415 (needs the extension)

    return None if key is None else parse_key(key)


def chosen_maps(
    stack: ExitStack, *, every: bool, number: int | None, pinned: Path | None, key: str | None
) -> "list[OpenMap]":
    """Return the maps that the options mean, opened; *stack* closes them."""
    from sockhop.diagnose.visit import open_sockmap, open_sockmaps  # noqa: PLC0415

    if sum((every, number is not None, pinned is not None)) > 1:
        raise InputError("--all, --id and --pinned exclude each other")
    if number is not None:
        return [open_sockmap(stack, number)]
    if pinned is not None:
        return [open_sockmap(stack, pinned)]
    if key is not None:
        raise InputError("--key is for one map", hint="name it with --id or --pinned")
    return open_sockmaps(stack)


def stale_entries(number: int) -> str:
    """Return `1 stale entry`, `2,000 stale entries`."""
    return f"{number:,} stale {'entry' if number == 1 else 'entries'}"


def print_pairs(check: "PairCheck", output: str) -> None:
    """Print which connections are half spliced, and where bytes wait that nobody reads."""
    if not check.sockets:
        click.echo("\nnote: no TCP socket was found in the namespaces that could be entered")
    for each in check.half_spliced:
        if not each.harmful and output != "wide":
            continue
        click.echo(
            f"\n{'half-spliced' if each.harmful else 'note: one end splices'}: "
            f"{_side(each.spliced)} splices to {_side(each.victim)}"
        )
        click.echo(f"  {each.cause}")
        if each.harmful:
            stray = f", where {each.strayed:,} bytes wait" if each.strayed else ""
            counts = f"(segs_out {each.spliced.segs_out}, segs_in {each.spliced.segs_in})"
            moved = f"no segment moved {counts}" if each.still else "segments moved"
            click.echo(
                f"  what the first sends goes to that entry's socket{stray}, and the second waits "
                f"for it; between the looks {moved}"
            )
    if check.queued and output == "wide":
        click.echo("\nbytes that nobody has read between the looks:")
        print_rows(check.queued, _QUEUED, output)
    elif check.queued:
        click.echo(f"\nnote: in {counted(len(check.queued), 'socket')} wait bytes that nobody has "
                   "read between the looks: -o wide lists them")  # fmt: skip


def _side(side: "Side") -> str:
    by = f" of {', '.join(side.processes)}" if side.processes else ""
    function = f": {side.receiver}" if side.receiver else ""
    return f"{side.local} ({side.handler}{function}){by}"
