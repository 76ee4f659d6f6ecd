"""`sockhop sever`."""

import click

from sockhop.cli.options import api_path, bpffs_path, global_options, output_option
from sockhop.cli.output import counted, print_rows
from sockhop.cli.socket_columns import action_columns

__all__ = ["command"]


@click.command(
    epilog="Example: sockhop sever --yes state established and backend = 10.1.0.2:53",
    context_settings={"ignore_unknown_options": False},
)
@click.argument("filters", nargs=-1, required=True, metavar="FILTER")
@click.option("--yes", is_flag=True, help="Do it. Without this nothing is ended.")
@click.option(
    "--engine",
    type=click.Choice(["auto", "iterator", "netlink"]),
    default="auto",
    show_default=True,
    help="How sockets are ended: `features` says what this kernel has.",
)
@output_option
@global_options
def command(filters: tuple[str, ...], yes: bool, engine: str, output: str) -> int:
    """End the sockets that FILTER means, in all network namespaces; their programs get an error.

    FILTER is in the language of ss, with tests of our own: service = NAME, backend = ADDRESS:PORT,
    netns = NAME, pid = NUMBER, cgroup = PATH, protocol = tcp, cookie = NUMBER, unmanaged.
    Sockets that listen or are in TIME-WAIT, UDP that is not connected and sockets that nobody
    holds are left. Without --yes it only says what it would do. Status 1 if nothing is meant, 3 if
    the kernel refused one.
    """
    from sockhop.agent.by_hand import sever_by_hand  # noqa: PLC0415 (slow to import)
    from sockhop.datapath.ending import Action, EngineName  # noqa: PLC0415

    rows = sever_by_hand(
        " ".join(filters), bpffs_path(), api_path(), engine=EngineName(engine), really=yes
    )
    if rows or output in ("json", "yaml"):
        print_rows(rows, action_columns(really=yes), output)
    done = sum(row.action == Action.SEVERED for row in rows)
    if not rows:
        click.echo("no socket is meant by that", err=True)
    elif yes:
        click.echo(f"{counted(done, 'socket')} severed", err=True)
    else:
        click.echo(
            f"{counted(done, 'socket')} would be severed; nothing was done: --yes does it", err=True
        )
    if any(row.action == Action.REFUSED for row in rows):
        return 3
    return 0 if rows else 1
