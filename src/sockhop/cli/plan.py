"""`sockhop plan`."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from sockhop.cli.options import (
    api_path,
    bpffs_path,
    cgroup_path,
    global_options,
    manifests_option,
    output_option,
)
from sockhop.cli.output import Column, cells, print_value, table

if TYPE_CHECKING:
    from sockhop.agent.brake import Limits
    from sockhop.agent.client import RunningAgent
    from sockhop.agent.concerns import Rules
    from sockhop.agent.desired import Wanted
    from sockhop.agent.impact import Impact
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
_SOCKETS = (
    Column("INTENT", "intent"),
    Column("BECAUSE", "trigger"),
    Column("SERVICE", "service"),
    Column("BACKEND", "backend"),
    Column("NETNS", "netns"),
    Column("PROCESS", "processes"),
    Column("SOCKETS", "sockets", text="{:,}".format),
)


@click.command(epilog="Example: sockhop plan -f services.yaml")
@manifests_option
@click.option("--node-name", metavar="NAME", default="", help="This node's name in Kubernetes.")
@output_option
@global_options
def command(paths: tuple[Path, ...], node_name: str, output: str) -> int:
    """Print what an agent with these manifests would change. Writes nothing.

    Works with or without a running agent; where nothing is installed, against empty maps. Also
    which live sockets are concerned, and what becomes of them. NEEDED is the most that a map holds
    while the change is made. Exit status 0 if nothing would change,
    1 if something would, 3 if a map has no room for it.
    """
    from sockhop.agent.capacity import check_capacity  # noqa: PLC0415 (slow to import)
    from sockhop.agent.client import ask_agent  # noqa: PLC0415
    from sockhop.agent.desired import want  # noqa: PLC0415
    from sockhop.agent.impact import find_impact  # noqa: PLC0415
    from sockhop.agent.overrides import read_overrides  # noqa: PLC0415
    from sockhop.agent.plan import make_plan  # noqa: PLC0415
    from sockhop.agent.policy_preview import (  # noqa: PLC0415
        forbidden_groups,
        policy_changes,
    )
    from sockhop.agent.preview import preview  # noqa: PLC0415

    agent = ask_agent(api_path())
    wanted = want(paths, agent, node_name, read_overrides(api_path(), bpffs_path()))
    for warning in wanted.warnings:
        click.echo(f"sockhop: {warning}", err=True)
    installed, sizes = _installed(bpffs_path())
    plan = make_plan(wanted.target, installed)
    rules = _rules(wanted)
    impact = find_impact(plan, installed, rules, _limits(agent), bpffs_path())
    shown = preview(plan, installed, sizes, impact)
    shown.policies = policy_changes(wanted, bpffs_path())
    if shown.policies:
        names = {number: name for name, number in installed.services.items()}
        top = Path(agent.state.cgroup) if agent else cgroup_path()
        impact.groups += forbidden_groups(wanted, rules, names, bpffs_path(), top)
    if output in ("json", "yaml"):
        print_value(shown, output)
    else:
        for line in (*_frontend_lines(shown), *_backend_lines(shown), *_policy_lines(shown)):
            click.echo(line)
        if not plan and not shown.policies:
            click.echo("nothing to do")
        _print_sockets(shown.sockets)
        titles = [column.title for column in _MAPS]
        click.echo("\n" + table([titles, *cells(shown.maps, _MAPS)]))
    check_capacity(shown.maps)
    return int(bool(plan or shown.policies))


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


def _rules(wanted: "Wanted") -> "Rules":
    """Return what services say of intents, those too that would go."""
    from sockhop.agent.orders import orders_path, read_rules  # noqa: PLC0415

    said = {service.name: service.intents for service in wanted.desired.services}
    before = read_rules(orders_path(api_path()), bpffs_path())
    return lambda name: said.get(name, before.get(name, ()))


def _limits(agent: "RunningAgent | None") -> "Limits":
    from sockhop.agent.brake import Limits  # noqa: PLC0415

    if agent is None:
        return Limits()
    found = agent.state.termination
    return Limits(brake=found.brake, approve_above=found.approve_above)


def _print_sockets(impact: "Impact") -> None:
    if not impact.groups:
        return
    total = ", ".join(f"{action} {count:,}" for action, count in impact.totals.items())
    click.echo(f"\nlive sockets: {total}")
    titles = [column.title for column in _SOCKETS]
    click.echo(table([titles, *cells(impact.groups, _SOCKETS)]))
    if impact.held:
        click.echo(f"held until `sockhop approve`: {impact.held}")


def _frontend_lines(shown: "Preview") -> Iterator[str]:
    from sockhop.agent.plan import NOWHERE_ELSE  # noqa: PLC0415 (slow to import)

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


def _policy_lines(shown: "Preview") -> Iterator[str]:
    for change in shown.policies:
        title = f"policy {change.policy}" if change.policy else "policies"
        yield f"{_SIGNS[change.action]} {title}: {change.detail}"


def _name(change: "FrontendChange | BackendChange") -> str:
    return f"{change.service}:{change.port_name}" if change.port_name else change.service
