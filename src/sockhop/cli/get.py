"""`sockhop get services|backends|sockets|splices|policies`."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeAlias

import click

from sockhop.cli.options import api_path, bpffs_path, global_options, output_option, parse_duration
from sockhop.cli.output import Column, age, phrases, print_rows
from sockhop.cli.socket_columns import SOCKET_COLUMNS

if TYPE_CHECKING:
    from sockhop.agent.inventory import BackendRow, ServiceRow
    from sockhop.agent.live_sockets import SocketRow
    from sockhop.agent.policy_rows import PolicyRow
    from sockhop.agent.splices import SpliceRow

    Rows: TypeAlias = Sequence[ServiceRow | BackendRow | SocketRow | PolicyRow | SpliceRow]

__all__ = ["command"]

_COLUMNS = {
    "services": (
        Column("SERVICE", "service"),
        Column("PORT", "port_name", wide=True),
        Column("FRONTEND", "frontend"),
        Column("SCOPE", "scope"),
        Column("TYPE", "type"),
        Column("BACKENDS", "backends"),
        Column("ALGORITHM", "algorithm", wide=True),
        Column("AFFINITY", "affinity_seconds", wide=True),
        Column("CONNECTS", "connects"),
        Column("REJECTED", "no_backend"),
        Column("NETNS-COOKIE", "netns_cookie", wide=True),
        Column("GENERATION", "generation", wide=True),
        Column("ID", "id", wide=True),
    ),
    "backends": (
        Column("SERVICE", "service"),
        Column("PORT", "port_name", wide=True),
        Column("BACKEND", "backend"),
        Column("PROTOCOL", "protocol"),
        Column("STATE", "state"),
        Column("BY-HAND", "by_hand", text=lambda said: "yes" if said else "-", wide=True),
        Column("WEIGHT", "weight"),
        Column("LIVE", "live"),
        Column("ID", "id", wide=True),
    ),
    "sockets": SOCKET_COLUMNS,
    "policies": (
        Column("POLICY", "policy"),
        Column("ACTION", "action"),
        Column("ENFORCED", "enforced"),
        Column("CLIENTS", "clients"),
        Column("TARGETS", "targets"),
        Column("DENIED", "denied"),
        Column("REMARKS", "reasons", text=phrases),
        Column("LIMITS", "limits", wide=True),
        Column("ID", "id", wide=True),
    ),
    "splices": (
        Column("STATE", "state"),
        Column("LOCAL", "local"),
        Column("REMOTE", "remote"),
        Column("SERVICE", "service"),
        Column("DIRECTION", "direction"),
        Column("WHY", "why"),
        Column("SPLICED", "spliced"),
        Column("STACK", "stack"),
        Column("UNREAD", "unread", wide=True),
        Column("BUDGET", "budget", wide=True),
        Column("LEAVE-AFTER", "leave_after", wide=True),
        Column("AGE", "age", text=age),
        Column("PROCESS", "processes"),
        Column("COOKIE", "cookie", wide=True),
        Column("PEER", "peer", wide=True),
        Column("NETNS", "netns", wide=True),
    ),
}
_IDENTITY = {
    "services": ("frontend", "netns_cookie"),
    "backends": ("id",),
    "sockets": ("cookie",),
    "splices": ("cookie",),
    "policies": ("policy",),
}
"""What makes a row the same one a moment later."""


@click.command(epilog="Example: sockhop get sockets state established and service = web")
@click.argument("what", type=click.Choice(list(_COLUMNS)))
@click.argument("filters", nargs=-1, metavar="[FILTER]")
@output_option
@click.option("-w", "--watch", is_flag=True, help="Go on showing what changes, until Ctrl-C.")
@click.option(
    "--interval",
    callback=parse_duration,
    default="2s",
    show_default=True,
    metavar="DURATION",
    help="How often --watch looks.",
)
@click.option(
    "--count", type=click.IntRange(1), metavar="N", help="End --watch after so many looks."
)
@global_options
def command(
    what: str,
    filters: tuple[str, ...],
    output: str,
    watch: bool,
    interval: float,
    count: int | None,
) -> int:
    """List services, backends, sockets or policies, as the kernel has them now.

    Works without a running agent. SCOPE says in which network namespaces a frontend holds.
    Sockets are those that are balanced, and unmanaged ones that are connected to a frontend or a
    backend; with a FILTER, in the language of ss and with tests of our own, all that it means.
    --watch keeps the table current on a terminal; elsewhere it appends a line for each row that
    comes, changes or goes, with -o json a JSON object.
    """
    if filters and what != "sockets":
        raise click.UsageError("a FILTER is for sockets")
    if watch:
        from sockhop.cli.get_watch import Watch  # noqa: PLC0415

        view = Watch(lambda: _read(what, filters, output), _COLUMNS[what], _IDENTITY[what], output)
        return view.run(interval, count)
    if count is not None:
        raise click.UsageError("--count is for --watch")
    print_rows(_read(what, filters, output), _COLUMNS[what], output)
    return 0


def _read(what: str, filters: tuple[str, ...], output: str) -> "Rows":
    if what == "sockets":
        return _read_sockets(" ".join(filters))
    from sockhop.agent.inventory import list_backends, list_services  # noqa: PLC0415 (slow to import)
    from sockhop.agent.plan import NOWHERE_ELSE  # noqa: PLC0415
    from sockhop.agent.splices import list_splices  # noqa: PLC0415
    from sockhop.datapath.balancer import BalanceMaps  # noqa: PLC0415

    if what == "policies":
        from sockhop.agent.policy_rows import list_policies  # noqa: PLC0415

        return list_policies(bpffs_path(), api_path())
    with BalanceMaps(bpffs_path()) as maps:
        if what == "backends":
            from sockhop.agent.overrides import read_overrides  # noqa: PLC0415

            return list_backends(maps, read_overrides(api_path(), bpffs_path()))
        if what == "splices":
            return list_splices(maps, bpffs_path())
        rows = list_services(maps)
        return [row for row in rows if output != "table" or row.scope != NOWHERE_ELSE]


def _read_sockets(text: str) -> "Rows":
    from sockhop.agent.expression import parse_expression  # noqa: PLC0415
    from sockhop.agent.live_sockets import (  # noqa: PLC0415
        balanced_and_unmanaged,
        chosen_sockets,
        socket_rows,
    )

    if text:
        return socket_rows(chosen_sockets(bpffs_path(), parse_expression(text)))
    return socket_rows(balanced_and_unmanaged(bpffs_path()))
