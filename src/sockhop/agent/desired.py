"""What should be installed, worked out as a running agent would, but by another process."""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from sockhop.agent.client import RunningAgent
from sockhop.agent.coexist import Coexistence
from sockhop.agent.health import with_quarantine
from sockhop.agent.overrides import with_overrides
from sockhop.agent.places import PlaceFinder
from sockhop.agent.policies import enforceable, table_of
from sockhop.agent.policy_table import PolicyTable
from sockhop.agent.state import Override
from sockhop.agent.target import Target, expand, with_redirects
from sockhop.errors import InputError
from sockhop.kernel.netns import current_cookie, entered, inode
from sockhop.model import Desired
from sockhop.sources.files import load

__all__ = ["Wanted", "agent_paths", "want"]

_PROC = Path("/proc")


class Wanted(NamedTuple):
    """What manifests ask for, what is to be installed for it, what is ignored, a line each.

    `table`: what the policies mean on this node.
    """

    desired: Desired
    target: Target
    warnings: tuple[str, ...]
    table: PolicyTable


def want(
    paths: Sequence[Path],
    agent: RunningAgent | None,
    node_name: str = "",
    overrides: Sequence[Override] = (),
) -> Wanted:
    """Return what the manifests at *paths* ask for, and *overrides* by hand.

    Loopback is local to the network namespace of *agent*, and what that leaves to another tool is
    left out; where none runs, this thread's namespace counts. InputError where the manifests
    cannot be read.
    """
    loaded = load(paths, node_name=node_name)
    if agent is not None and agent.state.source.coexist:
        loaded = Coexistence().leave_out(loaded)
    found_unhealthy = agent.state.health.unhealthy if agent else ()
    said = with_overrides(loaded.desired, overrides)
    meant = enforceable(with_quarantine(said, found_unhealthy))
    home, places = _home(agent), PlaceFinder()
    found = places.find(with_redirects(meant))
    desired = with_redirects(meant, found)
    target = expand(desired, home, found)
    return Wanted(desired, target, loaded.warnings, table_of(desired, home, places))


def agent_paths(agent: RunningAgent) -> list[Path]:
    """Return the sources of *agent*, as this process can open them."""
    process = _PROC / str(agent.pid)
    paths = [Path(path) for path in agent.state.source.paths]
    with suppress(OSError):
        directory = process.joinpath("cwd").readlink()
        paths = [directory / path for path in paths]
        if not process.joinpath("ns/mnt").samefile(_PROC / "self/ns/mnt"):
            paths = [process / "root" / path.relative_to("/") for path in paths]
    return paths


def _home(agent: RunningAgent | None) -> int:
    if agent is not None:
        path = _PROC / str(agent.pid) / "ns/net"
        with suppress(InputError, OSError):
            if inode(path) != inode():
                with entered(path):
                    return current_cookie()
    return current_cookie()
