"""`sockhop get services|backends|sockets|policies`."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeAlias

import click

from sockhop.cli.options import api_path, bpffs_path, global_options, output_option, parse_duration
from sockhop.cli.output import Column, age, print_rows

if TYPE_CHECKING:
    from sockhop.agent.inventory import BackendRow, ServiceRow, SocketRow
    from sockhop.agent.policy_rows import PolicyRow

    Rows: TypeAlias = Sequence[ServiceRow | BackendRow | SocketRow | PolicyRow]

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
        Column("WEIGHT", "weight"),
        Column("LIVE", "live"),
        Column("ID", "id", wide=True),
    ),
    "sockets": (
        Column("PROTOCOL", "protocol"),
        Column("STATE", "state"),
        Column("LOCAL", "local"),
        Column("FRONTEND", "frontend"),
        Column("BACKEND", "backend"),
        Column("SERVICE", "service"),
        Column("AGE", "age", text=age),
        Column("PROCESS", "processes"),
        Column("CHOSEN BY", "reason", wide=True),
        Column("COOKIE", "cookie", wide=True),
        Column("NETNS", "netns", wide=True),
        Column("GENERATION", "generation", wide=True),
        Column("BACKEND-ID", "backend_id", wide=True),
    ),
    "policies": (
        Column("POLICY", "policy"),
        Column("ACTION", "action"),
        Column("ENFORCED", "enforced"),
        Column("CLIENTS", "clients"),
        Column("TARGETS", "targets"),
        Column("DENIED", "denied"),
        Column("NOT ENFORCED BECAUSE", "reasons"),
        Column("LIMITS", "limits", wide=True),
        Column("ID", "id", wide=True),
    ),
}
_IDENTITY = {
    "services": ("frontend", "netns_cookie"),
    "backends": ("id",),
    "sockets": ("cookie",),
    "policies": ("policy",),
}
"""What makes a row the same one a moment later."""


@click.command(epilog="Example: sockhop get sockets -o wide")
@click.argument("what", type=click.Choice(list(_COLUMNS)))
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
def command(what: str, output: str, watch: bool, interval: float, count: int | None) -> int:
    """List services, backends, balanced sockets or policies, as the kernel has them now.

    Works without a running agent. SCOPE says in which network namespaces a frontend holds.
    --watch keeps the table current on a terminal; elsewhere it appends a line for each row that
    comes, changes or goes, with -o json a JSON object.
    """
    if watch:
        from sockhop.cli.get_watch import Watch  # noqa: PLC0415

        view = Watch(lambda: _read(what, output), _COLUMNS[what], _IDENTITY[what], output)
        return view.run(interval, count)
    if count is not None:
        raise click.UsageError("--count is for --watch")
    print_rows(_read(what, output), _COLUMNS[what], output)
    return 0


def _read(what: str, output: str) -> "Rows":
    from sockhop.agent.inventory import (  # noqa: PLC0415 (slow to import)
        NOWHERE_ELSE,
        list_backends,
        list_services,
        list_sockets,
    )
    from sockhop.datapath.balancer import BalanceMaps  # noqa: PLC0415

    if what == "policies":
        from sockhop.agent.policy_rows import list_policies  # noqa: PLC0415

        return list_policies(bpffs_path(), api_path())
    with BalanceMaps(bpffs_path()) as maps:
        if what == "backends":
            return list_backends(maps)
        if what == "sockets":
            return list_sockets(maps, bpffs_path())
        rows = list_services(maps)
        return [row for row in rows if output != "table" or row.scope != NOWHERE_ELSE]
