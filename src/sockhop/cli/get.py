"""`sockhop get services|backends|sockets`."""

import click

from sockhop.cli.options import bpffs_path, global_options, output_option
from sockhop.cli.output import Column, age, print_rows

__all__ = ["command"]

_COLUMNS = {
    "services": (
        Column("SERVICE", "service"),
        Column("PORT", "port_name", wide=True),
        Column("FRONTEND", "frontend"),
        Column("TYPE", "type"),
        Column("BACKENDS", "backends"),
        Column("ALGORITHM", "algorithm", wide=True),
        Column("AFFINITY", "affinity_seconds", wide=True),
        Column("CONNECTS", "connects"),
        Column("REJECTED", "no_backend"),
        Column("NETNS", "netns", wide=True),
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
        Column("AGE", "age"),
        Column("PROCESS", "processes"),
        Column("CHOSEN BY", "reason", wide=True),
        Column("COOKIE", "cookie", wide=True),
        Column("NETNS", "netns", wide=True),
        Column("GENERATION", "generation", wide=True),
        Column("BACKEND-ID", "backend_id", wide=True),
    ),
}


@click.command(epilog="Example: sockhop get sockets -o wide")
@click.argument("what", type=click.Choice(list(_COLUMNS)))
@output_option
@global_options
def command(what: str, output: str) -> None:
    """List services, backends or balanced sockets, as the kernel has them now.

    Works without a running agent. In `get services`, a frontend with a NETNS (a cookie) holds
    in that network namespace only.
    """
    from sockhop.agent.inventory import (  # noqa: PLC0415 (slow to import)
        list_backends,
        list_services,
        list_sockets,
    )
    from sockhop.datapath.balancer import BalanceMaps  # noqa: PLC0415

    with BalanceMaps(bpffs_path()) as maps:
        if what == "services":
            print_rows(list_services(maps), _COLUMNS[what], output)
        elif what == "backends":
            print_rows(list_backends(maps), _COLUMNS[what], output)
        else:
            rows = list_sockets(maps, bpffs_path())
            if output in ("table", "wide"):
                for row in rows:
                    row.age = age(row.age)  # type: ignore[assignment]
            print_rows(rows, _COLUMNS[what], output)
