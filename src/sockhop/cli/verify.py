"""`sockhop verify`."""

from collections.abc import Sequence
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
    from sockhop.agent.desired import Wanted
    from sockhop.agent.policy_table import PolicyTable
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
@click.option(
    "--node-name",
    metavar="NAME",
    default="",
    help="This node's name in Kubernetes, for -f.",
)
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
    manifests = _Manifests(paths, node_name, agent)
    wanted, policies = (manifests.target, manifests.policies) if manifests else (None, None)
    verdict = verify(bpffs_path(), cgroup, wanted, policies)
    if not paths and agent is None:
        verdict.notes.append("no agent runs and no -f is given: not compared with manifests")
    if output in ("json", "yaml"):
        print_value(verdict, output)
    else:
        _print(verdict, output)
    return int(bool(verdict.differences))


class _Manifests:
    """Reads the manifests anew at each look, or once those that are given."""

    def __init__(
        self, paths: tuple[Path, ...], node_name: str, agent: "RunningAgent | None"
    ) -> None:
        self._agent = agent
        self._given = self._want(paths, node_name) if paths else None
        self._last = self._given

    def __bool__(self) -> bool:
        return self._given is not None or self._agent is not None

    def target(self) -> "Target":
        """Return what they ask for now."""
        from sockhop.agent.client import ask_agent  # noqa: PLC0415
        from sockhop.agent.desired import agent_paths  # noqa: PLC0415

        if self._given is None and self._agent is not None:
            self._agent = ask_agent(api_path()) or self._agent  # health may have changed
            paths = agent_paths(self._agent)
            self._last = self._want(paths, self._agent.state.source.node_name)
        assert self._last is not None
        return self._last.target

    def _want(self, paths: Sequence[Path], node_name: str) -> "Wanted":
        from sockhop.agent.desired import want  # noqa: PLC0415 (slow to import)
        from sockhop.agent.overrides import read_overrides  # noqa: PLC0415

        overrides = read_overrides(api_path(), bpffs_path())
        return want(paths, self._agent, node_name, overrides)

    def policies(self) -> "PolicyTable":
        """Return the policies that they asked for when target() was called last."""
        assert self._last is not None
        return self._last.table


def _print(verdict: "Verdict", output: str) -> None:
    if verdict.differences:
        print_rows(verdict.differences, _COLUMNS, output)
    else:
        compared = ", ".join(counted(n, what[:-1]) for what, n in verdict.compared.items())
        click.echo(f"all as it should be: {compared}")
    for note in verdict.notes:
        click.echo(f"note: {note}")
