"""`sockhop status`."""

import time
from pathlib import Path

import click
import msgspec

from sockhop.agent.state import AgentState
from sockhop.cli.options import api_path, bpffs_path, global_options, output_option
from sockhop.cli.output import age, counted, print_value, table

__all__ = ["command"]


class _MapUse(msgspec.Struct):
    map: str
    used: int
    size: int


class _Status(msgspec.Struct):
    """`agent` is None where none runs; `hooks` has the ids of the programs that run."""

    bpffs: str
    balancing: bool
    bypass: bool
    hooks: dict[str, int]
    maps: list[_MapUse]
    events: dict[str, int]
    agent: AgentState | None


@click.command(epilog="Example: sockhop status -o json")
@output_option
@global_options
def command(output: str) -> int:
    """Say whether and how balancing works here.

    Exit status 0 if an agent runs, its sources are good and every hook is attached; else 1.
    """
    status = _status(bpffs_path(), api_path())
    if output in ("json", "yaml"):
        print_value(status, output)
    else:
        click.echo(table(_lines(status)))
    agent = status.agent
    return int(not (status.balancing and not status.bypass and agent and agent.healthy))


def _status(pins: Path, api: Path) -> _Status:
    from sockhop.agent.client import ask_agent  # noqa: PLC0415
    from sockhop.agent.installed import map_usage  # noqa: PLC0415 (needs the extension)
    from sockhop.datapath.balancer import (  # noqa: PLC0415
        HOOKS,
        BalanceMaps,
        NotInstalled,
        attached_hooks,
    )
    from sockhop.datapath.records import Setting, Total  # noqa: PLC0415

    running = ask_agent(api)
    agent = running.state if running else None
    try:
        with BalanceMaps(pins) as maps:
            hooks = {hook.hook: program for hook, program in attached_hooks(pins).items()}
            return _Status(
                bpffs=str(pins),
                balancing=len(hooks) == len(HOOKS),
                bypass=bool(maps.setting(Setting.BYPASS)),
                hooks=hooks,
                maps=[_MapUse(*use) for use in map_usage(maps)],
                events={Total(i).name.lower(): n for i, n in maps.totals.items()},
                agent=agent,
            )
    except NotInstalled:
        return _Status(str(pins), False, False, {}, [], {}, agent)


def _lines(status: _Status) -> list[tuple[str, str]]:
    lines = [("balancing", "yes" if status.balancing else "no: hooks are missing")]
    if not status.hooks:
        lines = [("balancing", f"no: nothing is installed in {status.bpffs}")]
    if status.bypass:
        lines.append(("bypass", "ON: every connect passes untouched (sockhop bypass off)"))
    lines += _agent_lines(status.agent)
    if status.hooks:
        lines.append(("hooks", ", ".join(f"{h} #{i}" for h, i in status.hooks.items())))
    lines += [(f"map {use.map}", f"{use.used:,} of {use.size:,}") for use in status.maps]
    lines += [(event.replace("_", " "), f"{n:,}") for event, n in status.events.items() if n]
    return lines


def _agent_lines(agent: AgentState | None) -> list[tuple[str, str]]:
    if agent is None:
        return [("agent", "not running: what is installed stays as it is")]
    now = time.time()
    lines = [
        ("agent", f"pid {agent.pid}, version {agent.version}, up {age(now - agent.started_at)}"),
        ("cgroup", agent.cgroup),
        ("sources", ", ".join(agent.source.paths)),
        (
            "installed",
            f"{counted(agent.services, 'service')}, {counted(agent.frontends, 'frontend')}, "
            f"{counted(agent.backends, 'backend')}, generation {agent.generation}",
        ),
        ("last sync", f"{age(now - agent.synced_at)} ago, took {agent.sync_seconds * 1e3:.0f} ms"),
    ]
    if agent.source.error:
        lines.append(("SOURCE ERROR", f"last good state in force: {agent.source.error}"))
    if agent.sync_error:
        lines.append(("SYNC ERROR", agent.sync_error))
    return lines + [("warning", warning) for warning in agent.source.warnings]
