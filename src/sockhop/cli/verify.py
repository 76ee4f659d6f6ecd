"""`sockhop verify`."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from sockhop.cli.options import (
    api_path,
    bpffs_path,
    cgroup_path,
    global_options,
    output_option,
)
from sockhop.cli.output import Column, counted, print_rows, print_value

if TYPE_CHECKING:
    from sockhop.agent.client import RunningAgent
    from sockhop.agent.target import Target
    from sockhop.agent.verify import Verdict

__all__ = ["command"]

_COLUMNS = (
    Column("CHECK", "check"),
    Column("WHERE", "where"),
    Column("EXPECTED", "expected"),
    Column("FOUND", "found"),
)


@click.command(epilog="Example: sockhop verify -f services.yaml")
@click.option(
    "-f",
    "--file",
    "paths",
    multiple=True,
    type=click.Path(path_type=Path),
    metavar="PATH",
    help="A manifest or a directory of manifests [default: those that the running agent follows].",
)
@click.option("--node-name", default="", help="This node's name in Kubernetes, for -f.")
@output_option
@global_options
def command(paths: tuple[Path, ...], node_name: str, output: str) -> int:
    """Compare what should be, what is installed and what sockets do.

    CHECK is desired: the maps against the manifests; installed: the maps against each other;
    hooks: whether our programs run; live: sockets whose backend is gone, and live counts that are
    too low. Exit status 0 if all is as it should be, 1 if something differs.
    """
    from sockhop.agent.client import ask_agent  # noqa: PLC0415 (slow to import)
    from sockhop.agent.verify import verify  # noqa: PLC0415

    agent = ask_agent(api_path())
    cgroup = Path(agent.state.cgroup) if agent else cgroup_path()
    verdict = verify(bpffs_path(), cgroup, _wanted(paths, node_name, agent))
    if not paths and agent is None:
        verdict.notes.append("no agent runs and no -f is given: not compared with manifests")
    if output in ("json", "yaml"):
        print_value(verdict, output)
    else:
        _print(verdict, output)
    return int(bool(verdict.differences))


def _wanted(
    paths: tuple[Path, ...], node_name: str, agent: "RunningAgent | None"
) -> "Callable[[], Target] | None":
    """Return what reads the manifests, if there are any to read."""
    from sockhop.agent.desired import agent_paths, want  # noqa: PLC0415 (slow to import)

    if paths:
        target = want(paths, agent, node_name).target
        return lambda: target
    if agent is None:
        return None
    return lambda: want(agent_paths(agent), agent, agent.state.source.node_name).target


def _print(verdict: "Verdict", output: str) -> None:
    if verdict.differences:
        print_rows(verdict.differences, _COLUMNS, output)
    else:
        compared = ", ".join(counted(n, what[:-1]) for what, n in verdict.compared.items())
        click.echo(f"all as it should be: {compared}")
    for note in verdict.notes:
        click.echo(f"note: {note}")
