"""`sockhop resteer`."""

from collections import Counter

import click

from sockhop.cli.options import api_path, bpffs_path, global_options, output_option
from sockhop.cli.output import counted, print_rows
from sockhop.cli.socket_columns import action_columns

__all__ = ["command"]


@click.command(
    epilog="Example: sockhop resteer --yes protocol = udp and backend = 10.1.0.2:53",
)
@click.argument("filters", nargs=-1, required=True, metavar="FILTER")
@click.option("--yes", is_flag=True, help="Do it. Without this nothing is moved or ended.")
@click.option("--sever", is_flag=True, help="End those that cannot be moved, TCP too.")
@output_option
@global_options
def command(filters: tuple[str, ...], yes: bool, sever: bool, output: str) -> int:
    """Move the connected UDP sockets that FILTER means to another backend of what they dialled.

    FILTER is as for `sockhop sever`. The programs keep their sockets and notice nothing. Sockets
    that cannot be moved (docs/resteering.md) are left, or severed with --sever. Without --yes it
    only says what it would do. Status 1 if nothing was, or would be, moved or severed, 3 if the
    kernel refused to end one.
    """
    from sockhop.agent.by_hand import resteer_by_hand  # noqa: PLC0415 (slow to import)
    from sockhop.datapath.ending import Action  # noqa: PLC0415

    rows = resteer_by_hand(" ".join(filters), bpffs_path(), api_path(), sever=sever, really=yes)
    if rows or output in ("json", "yaml"):
        print_rows(rows, action_columns(really=yes), output)
    number = Counter(row.action for row in rows)
    done = number[Action.RESTEERED] + number[Action.SEVERED]
    would = "" if yes else "would be "
    text = f"{counted(number[Action.RESTEERED], 'socket')} {would}resteered"
    if number[Action.SEVERED]:
        text += f", {number[Action.SEVERED]} {would}severed"
    if not rows:
        text = "no socket is meant by that"
    elif done and not yes:
        text += "; nothing was done: --yes does it"
    click.echo(text, err=True)
    if number[Action.REFUSED]:
        return 3
    return 0 if done else 1
