"""`sockhop plan`."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from sockhop.cli.options import (
    api_path,
    bpffs_path,
    global_options,
    manifests_option,
    output_option,
)
from sockhop.cli.output import Column, cells, print_value, table

if TYPE_CHECKING:
    from sockhop.agent.plan import Installed
    from sockhop.agent.preview import BackendChange, FrontendChange, Preview

__all__ = ["command"]

_SIGNS = {"add": "+", "change": "~", "remove": "-"}
_MAPS = (
    Column("MAP", "map"),
    Column("USED", "used", text="{:,}".format),
    Column("NEEDED", "needed", text="{:,}".format),
    Column("SIZE", "size", text="{:,}".format),
)


@click.command(epilog="Example: sockhop plan -f services.yaml")
@manifests_option
@click.option("--node-name", default="", help="This node's name in Kubernetes.")
@output_option
@global_options
def command(paths: tuple[Path, ...], node_name: str, output: str) -> int:
    """Print what an agent with these manifests would change. Writes nothing.

    Works with or without a running agent; where nothing is installed, against empty maps. NEEDED
    is the most that a map holds while the change is made. Exit status 0 if nothing would change,
    1 if something would, 3 if a map has no room for it.
    """
    from sockhop.agent.capacity import check_capacity  # noqa: PLC0415 (slow to import)
    from sockhop.agent.client import ask_agent  # noqa: PLC0415
    from sockhop.agent.desired import want  # noqa: PLC0415
    from sockhop.agent.plan import make_plan  # noqa: PLC0415
    from sockhop.agent.preview import preview  # noqa: PLC0415

    wanted = want(paths, ask_agent(api_path()), node_name)
    for warning in wanted.warnings:
        click.echo(f"sockhop: {warning}", err=True)
    installed, sizes = _installed(bpffs_path())
    plan = make_plan(wanted.target, installed)
    shown = preview(plan, installed, sizes)
    if output in ("json", "yaml"):
        print_value(shown, output)
    else:
        for line in (*_frontend_lines(shown), *_backend_lines(shown)):
            click.echo(line)
        if not plan:
            click.echo("nothing to do")
        titles = [column.title for column in _MAPS]
        click.echo("\n" + table([titles, *cells(shown.maps, _MAPS)]))
    check_capacity(shown.maps)
    return int(bool(plan))


def _installed(pins: Path) -> "tuple[Installed, dict[str, int]]":
    """Return what the maps hold, and their sizes; without maps nothing, and default sizes."""
    from sockhop.agent.installed import read_installed  # noqa: PLC0415
    from sockhop.agent.plan import Installed  # noqa: PLC0415
    from sockhop.datapath.balancer import BalanceMaps, NotInstalled  # noqa: PLC0415
    from sockhop.kernel.objects import declared_sizes, object_path  # noqa: PLC0415

    try:
        with BalanceMaps(pins) as maps:
            return read_installed(maps), maps.sizes()
    except NotInstalled:
        return Installed({}, {}, {}), declared_sizes(object_path("balance"))


def _frontend_lines(shown: "Preview") -> Iterator[str]:
    from sockhop.agent.inventory import NOWHERE_ELSE  # noqa: PLC0415 (slow to import)

    met = {change.frontend for change in shown.frontends if change.scope != NOWHERE_ELSE}
    for change in shown.frontends:
        if change.scope == NOWHERE_ELSE and change.frontend in met:
            continue
        where = "" if change.scope == "everywhere" else f" ({change.scope})"
        detail = f": {change.detail}" if change.detail else ""
        yield f"{_SIGNS[change.action]} {_name(change)} {change.frontend}{where}{detail}"


def _backend_lines(shown: "Preview") -> Iterator[str]:
    """Describe the backends that the lines about frontends do not name."""
    for backend in shown.backends:
        if not backend.serves:
            yield (
                f"{_SIGNS[backend.action]} {_name(backend)} backend "
                f"{backend.backend}/{backend.protocol.lower()}: "
                f"{backend.state}, weight {backend.weight}"
            )


def _name(change: "FrontendChange | BackendChange") -> str:
    return f"{change.service}:{change.port_name}" if change.port_name else change.service
