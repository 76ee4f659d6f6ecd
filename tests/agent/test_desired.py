"""Another process works out what the agent wants, wherever either of them is."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from sockhop.agent.client import RunningAgent
from sockhop.agent.desired import agent_paths, want
from sockhop.agent.state import AgentState, SourceState
from sockhop.datapath.records import FrontendKey
from sockhop.kernel.netns import current_cookie
from sockhop.model import pack_address
from tests.sandbox import compact

pytestmark = pytest.mark.kernel

LOCAL = compact(local={"frontends": ["127.96.0.1:80"], "backends": ["127.0.0.1:7001"]})


@contextmanager
def process(*command: str) -> Iterator[int]:
    """A process that stands still once it has done *command*."""
    with subprocess.Popen(
        [*command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as started:
        assert started.stdin
        assert started.stdout
        assert started.stdout.readline() == "ready\n"
        yield started.pid
        started.stdin.close()


def agent(pid: int, *paths: str) -> RunningAgent:
    state = AgentState(pid, "", 0.0, "", "", SourceState(list(paths)))
    return RunningAgent(state, pid)


def homes(paths: list[Path], running: RunningAgent | None) -> set[int]:
    keys = want(paths, running).target.entries
    return {key.netns for key in keys if key.netns}


def test_sources_are_relative_to_the_agent(tmp_path: Path) -> None:
    (tmp_path / "services.yaml").write_text(LOCAL)
    script = f"cd {tmp_path}; echo ready; read end"
    with process("sh", "-c", script) as pid:
        running = agent(pid, "services.yaml", "/etc/sockhop")
        assert agent_paths(running) == [tmp_path / "services.yaml", Path("/etc/sockhop")]


def test_an_agent_with_mounts_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "services.yaml").write_text(LOCAL)
    script = "set -e; mount -t tmpfs none /media; cp $0 /media; cd /media; echo ready; read end"
    source = str(tmp_path / "services.yaml")
    with process("unshare", "--mount", "sh", "-c", script, source) as pid:
        (path,) = agent_paths(agent(pid, "services.yaml"))
        assert path.read_text() == LOCAL
        assert not Path("/media/services.yaml").exists()


def test_loopback_is_local_to_the_agents_namespace(tmp_path: Path) -> None:
    path = tmp_path / "services.yaml"
    path.write_text(LOCAL)
    own = current_cookie()
    assert homes([path], None) == {own}
    with process("sh", "-c", "echo ready; read end") as pid:
        assert homes([path], agent(pid)) == {own}
    with process("unshare", "--net", "sh", "-c", "echo ready; read end") as pid:
        (elsewhere,) = homes([path], agent(pid))
    assert elsewhere != own
    # It has ended meanwhile, or runs where this process cannot see it.
    assert homes([path], agent(pid)) == {own}
    assert FrontendKey(pack_address("127.96.0.1"), own, 80, 6) in want([path], None).target.entries
