"""The agent and a directory of manifests: one file differs, and only that is read again."""

import asyncio
import json
import logging
import signal
from pathlib import Path
from typing import Any

import pytest

from sockhop.agent.agent import _Agent
from sockhop.errors import SystemLackError
from tests.agent.test_agent import ask, asked
from tests.sandbox import Sandbox, ServerThread, compact, publish, wait_until


def web(server: ServerThread, vip: str = "10.0.0.10") -> str:
    return compact(**{f"web-{vip}": {"frontends": [f"{vip}:80"], "backends": [server.endpoint]}})


def stale(agent: Any) -> str:
    return str(agent.status()["source"]["error"])


@pytest.mark.kernel
def test_files_come_change_break_and_go(sandbox: Sandbox) -> None:
    home = sandbox.directory / "manifests"
    home.mkdir()
    with ServerThread("one", "10.96.0.1") as one, ServerThread("two", "10.96.0.1") as two:
        for number in range(20, 60):
            publish(home / f"{number}.yaml", web(one, f"10.0.0.{number}"))
        publish(home / "web.yaml", web(one))
        with sandbox.agent(home) as agent:
            assert asked() == {"one"}
            publish(home / "web.yaml", web(two))
            wait_until(lambda: asked() == {"two"}, "the other backend")
            assert ask("10.0.0.33") == "one"
            publish(home / "new.json", web(two, "10.0.0.11"))
            wait_until(lambda: agent.status()["services"] == 42, "the new service")
            assert ask("10.0.0.11") == "two"
            publish(home / "new.json", "{")
            wait_until(lambda: "new.json" in stale(agent), "the error")
            publish(home / "web.yaml", web(one))  # not seen as long as that holds
            (home / "20.yaml").unlink()
            wait_until(lambda: asked() == {"two"}, "the last good state")
            (home / "new.json").unlink()
            wait_until(lambda: not stale(agent), "the sources to be good")
            assert asked() == {"one"}
            assert agent.status()["services"] == 40
            assert json.loads(sandbox.sockhop("get", "services", "-o", "json").stdout)
            # A file that is written where inotify does not see it.
            (home / "30.yaml").unlink()
            (home / "30.yaml").symlink_to(sandbox.directory / "elsewhere" / "30.yaml")
            wait_until(lambda: "30.yaml" in stale(agent), "the dangling link")
            (sandbox.directory / "elsewhere").mkdir()
            publish(sandbox.directory / "elsewhere" / "30.yaml", web(two, "10.0.0.30"))
            wait_until(lambda: not stale(agent), "the link to lead somewhere")
            assert ask("10.0.0.30") == "two"
            agent.process.send_signal(signal.SIGHUP)
            wait_until(lambda: "SIGHUP" in agent.log.read_text(), "the hangup in the log")
            assert agent.status()["services"] == 40


@pytest.mark.unit
def test_too_few_watches_do_not_end_the_agent(caplog: pytest.LogCaptureFixture) -> None:
    class Exhausted:
        def changed(self) -> bool:
            raise SystemLackError("inotify_add_watch: No space left on device")

    agent: Any = object.__new__(_Agent)
    agent._wake = asyncio.Event()
    with caplog.at_level(logging.ERROR):
        agent._on_change(Exhausted())
    assert agent._wake.is_set()
    assert "No space left on device" in caplog.text


@pytest.mark.kernel
def test_a_directory_that_is_replaced(sandbox: Sandbox, tmp_path: Path) -> None:
    home = sandbox.directory / "manifests"
    with ServerThread("one", "10.96.0.1") as one, ServerThread("two", "10.96.0.1") as two:
        for directory, server in ((home, one), (tmp_path / "next", two)):
            directory.mkdir()
            publish(directory / "web.yaml", web(server))
        with sandbox.agent(home) as agent:
            home.rename(tmp_path / "old")
            wait_until(lambda: stale(agent), "the error")
            (tmp_path / "next").rename(home)
            wait_until(lambda: asked() == {"two"}, "the other directory")
            publish(home / "web.yaml", web(one))
            wait_until(lambda: asked() == {"one"}, "the change in it")
