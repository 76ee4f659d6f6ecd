"""`sockhop status`."""

import time
from pathlib import Path

import click
import msgspec

from sockhop.agent.state import AgentState, HealthState, SplicingState, WatchState
from sockhop.cli.approve import held_text
from sockhop.cli.backend import override_text
from sockhop.cli.options import api_path, bpffs_path, cgroup_path, global_options, output_option
from sockhop.cli.output import age, counted, print_value, table
from sockhop.model import endpoint

__all__ = ["command", "read_status"]


class _MapUse(msgspec.Struct):
    map: str
    used: int
    size: int


class _Other(msgspec.Struct):
    """A program of somebody else's near ours; `order` as it runs: before, after, instead, …"""

    hook: str
    id: int
    name: str
    tag: str
    cgroup: str
    place: str
    order: str
    meaning: str


class _Status(msgspec.Struct):
    """`agent` is None where none runs; `hooks` has the ids of the programs that run.

    `others` are those of other tools at the hooks of ours, on `cgroup`, above and below;
    `others_unseen` says why there may be more of them, if so.
    """

    bpffs: str
    agent: AgentState | None
    cgroup: str
    balancing: bool = False
    bypass: bool = False
    hooks: dict[str, int] = {}
    maps: list[_MapUse] = []
    events: dict[str, int] = {}
    others: list[_Other] = []
    others_unseen: str = ""


@click.command(epilog="Example: sockhop status -o json")
@output_option
@global_options
def command(output: str) -> int:
    """Say whether and how balancing works here.

    Exit status 0 if an agent runs, its sources are good, every hook is attached and bypass is off;
    else 1.
    """
    status = read_status(bpffs_path(), api_path())
    if output in ("json", "yaml"):
        print_value(status, output)
    else:
        click.echo(table(_lines(status, each=output == "wide")))
    agent = status.agent
    return int(not (status.balancing and not status.bypass and agent and agent.healthy))


def read_status(pins: Path, api: Path) -> _Status:
    """Return what `status` shows."""
    from sockhop.agent.client import ask_agent  # noqa: PLC0415
    from sockhop.agent.installed import map_usage  # noqa: PLC0415 (needs the extension)
    from sockhop.datapath.balancer import (  # noqa: PLC0415
        HOOKS,
        BalanceMaps,
        NotInstalled,
        attached_hooks,
        balanced_cgroup,
    )
    from sockhop.datapath.records import Setting  # noqa: PLC0415

    running = ask_agent(api)
    agent = running.state if running else None
    cgroup = balanced_cgroup(pins) or (Path(agent.cgroup) if agent else cgroup_path())
    status = _Status(str(pins), agent, str(cgroup))
    status.others, status.others_unseen = _others(pins, cgroup)
    try:
        with BalanceMaps(pins) as maps:
            status.hooks = {hook.hook: id for hook, id in attached_hooks(pins, cgroup).items()}
            status.balancing = len(status.hooks) == len(HOOKS)
            status.bypass = bool(maps.setting(Setting.BYPASS))
            status.maps = [_MapUse(*use) for use in map_usage(maps)]
            status.events = {event.name.lower(): n for event, n in maps.events().items()}
    except NotInstalled:
        pass
    return status


def _others(pins: Path, cgroup: Path) -> tuple[list[_Other], str]:
    from sockhop.datapath.balancer import survey  # noqa: PLC0415
    from sockhop.kernel.syscall import KernelError  # noqa: PLC0415

    if not cgroup.is_dir():  # it is gone
        return [], ""
    try:
        found = survey(pins, cgroup)
    except KernelError as error:
        return [], error.message
    others = [
        _Other(
            hook=program.hook.hook,
            id=program.id,
            name=program.name,
            tag=program.tag,
            cgroup=str(program.cgroup),
            place=program.place,
            order=program.order,
            meaning=program.meaning,
        )
        for program in found.programs
    ]
    unseen = "" if found.is_complete else "there are too many cgroups to look at all of them"
    return others, unseen


def _lines(status: _Status, *, each: bool) -> list[tuple[str, str]]:
    lines = [("balancing", "yes" if status.balancing else "no: hooks are missing")]
    if not status.hooks:
        lines = [("balancing", f"no: nothing is installed in {status.bpffs}")]
    elif status.bypass:
        lines = [("balancing", "no: every connect passes untouched until `sockhop bypass off`")]
    if status.agent:
        lines += _agent_lines(status.agent)
    else:
        rest = ": what is installed stays as it is" if status.hooks else ""
        lines.append(("agent", f"not running{rest}"))
    if status.hooks:
        if status.agent is None:
            lines.append(("cgroup", status.cgroup))
        lines.append(("hooks", ", ".join(f"{h} #{i}" for h, i in status.hooks.items())))
    lines += [("other tool", line) for line in _other_lines(status.others, each=each)]
    if status.others_unseen:
        lines.append(("other tools", f"may be more: {status.others_unseen}"))
    lines += [(f"map {use.map}", f"{use.used:,} of {use.size:,}") for use in status.maps]
    lines += [(event.replace("_", " "), f"{n:,}") for event, n in status.events.items() if n]
    return lines


def _other_lines(others: list[_Other], *, each: bool) -> list[str]:
    """A line for each program, or unless *each*, one for all that are alike but for the cgroup."""
    alike: dict[tuple[object, ...], list[_Other]] = {}
    for i, other in enumerate(others):
        key = i if each else (other.hook, other.name, other.tag, other.meaning)
        alike.setdefault((key,), []).append(other)
    lines = []
    for first, *more in alike.values():
        ids = {other.id for other in more} - {first.id}
        named = f"{first.name} (tag {first.tag})" if first.tag else "(its name needs CAP_SYS_ADMIN)"
        lines.append(
            f"{first.hook} #{first.id}{f' and {len(ids)} more' if ids else ''} {named} "
            f"at {first.cgroup}{f' and {len(more)} more' if more else ''}: {first.meaning}"
        )
    return lines


def _agent_lines(agent: AgentState) -> list[tuple[str, str]]:
    now = time.time()
    lines = [
        ("agent", f"pid {agent.pid}, version {agent.version}, up {age(now - agent.started_at)}"),
        ("cgroup", agent.cgroup),
        ("sources", ", ".join(agent.source.paths)),
        (
            "installed",
            f"{counted(agent.services, 'service')}, {counted(agent.frontends, 'frontend')}, "
            f"{counted(agent.backends, 'backend')}, {_policies(agent)}"
            f"generation {agent.generation}",
        ),
        ("last sync", f"{age(now - agent.synced_at)} ago, took {agent.sync_seconds * 1e3:.0f} ms"),
    ]
    found = agent.termination
    lines += [("HELD (sockhop approve)", held_text(change)) for change in found.held]
    lines += [("BY HAND", override_text(each)) for each in agent.overrides]
    lines += _health_lines(agent.health)
    if found.draining:
        lines.append(("draining", counted(found.draining, "socket")))
    if found.parked:
        lines.append(("parked", f"{counted(found.parked, 'UDP socket')}: no backend is active"))
    for engine, count in sorted(found.failures.items()):
        lines.append(("engine", f"{engine} failed {count:,} times, another way was taken"))
    if found.done:
        done = ", ".join(f"{action} {n:,}" for action, n in sorted(found.done.items()))
        lines.append(("sockets", f"{done}, with {found.engine}"))
    if agent.source.error:
        lines.append(("SOURCE ERROR", f"last good state in force: {agent.source.error}"))
    if agent.sync_error:
        lines.append(("SYNC ERROR", agent.sync_error))
    lines += _splice_lines(agent.splicing)
    lines += _watch_lines(agent.watch)
    return lines + [("warning", warning) for warning in agent.source.warnings]


def _policies(agent: AgentState) -> str:
    number = sum(not policy.refused for policy in agent.policies)
    return f"{number} {'policy' if number == 1 else 'policies'}, " if number else ""


def _health_lines(health: HealthState) -> list[tuple[str, str]]:
    now, lines = time.time(), []
    for backend in health.unhealthy:
        where = f"{endpoint(backend.address, backend.port)} of {backend.service}"
        lines.append(("UNHEALTHY", f"{where}: {backend.reason}, for {age(now - backend.since)}"))
    if health.checked:
        checked = counted(health.checked, "backend")
        lines.append(("health", f"{checked} checked, {len(health.unhealthy)} unhealthy"))
    for why, count in sorted(health.unasked.items()):
        lines.append(("NOT CHECKED", f"{counted(count, 'backend')}: the agent can't ask: {why}"))
    return lines


def _watch_lines(watch: WatchState) -> list[tuple[str, str]]:
    if watch.reason:
        return [("not watched", watch.reason)]
    now = time.time()
    return [
        ("FOUND", f"{age(now - each.since)} ago: {each.cause}: {each.because}; {each.advice}")
        for each in watch.findings
    ]


def _splice_lines(splicing: SplicingState) -> list[tuple[str, str]]:
    what = ", ".join(splicing.services) or splicing.reason or "what the options name"
    lines = [("splicing", f"{splicing.state}: {splicing.reason or what}")]
    if splicing.given_up:
        lines.append(("not spliced", f"{', '.join(splicing.given_up)}: it did not help"))
    return lines + [("kernel fault", fault) for fault in splicing.faults]
