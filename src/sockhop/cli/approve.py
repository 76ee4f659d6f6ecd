"""`sockhop approve`."""

from typing import TYPE_CHECKING

import click

from sockhop.cli.options import api_path, global_options, output_option
from sockhop.cli.output import counted, print_value
from sockhop.errors import SystemLackError

if TYPE_CHECKING:
    from sockhop.agent.state import HeldChange

__all__ = ["command", "held_text"]


@click.command(epilog="Example: sockhop approve 17")
@click.argument("changes", metavar="[CHANGE]...", type=click.IntRange(min=1), nargs=-1)
@output_option
@global_options
def command(changes: tuple[int, ...], output: str) -> int:
    """Let changes that are held end and move live sockets, all or those with these numbers.

    `sockhop status` shows them. Times to drain begin now. Exit status 1 if nothing of that is held.
    """
    from sockhop.agent.client import approve_changes  # noqa: PLC0415

    approved = approve_changes(api_path(), changes or None)
    if approved is None:
        raise SystemLackError(
            f"{api_path()}: no agent is running there",
            hint="what is held stays so until an agent runs; or name its socket with --api",
        )
    if output in ("json", "yaml"):
        print_value(approved, output)
    else:
        for change in approved:
            click.echo(f"approved: {held_text(change)}")
        if not approved:
            click.echo("nothing is held" if not changes else "nothing of that is held", err=True)
    return int(not approved)


def held_text(change: "HeldChange") -> str:
    """Return what a change that is held concerns, and why it is."""
    what = "; ".join(change.what)
    return f"change {change.change}, {counted(change.sockets, 'socket')}: {what} ({change.reason})"
