"""`sockhop get --watch` keeps a table current, or appends what changes."""

import contextlib
import fcntl
import json
import os
import pty
import re
import select
import signal
import socket
import struct
import subprocess
import termios
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import yaml

from tests.sandbox import SOCKHOP, Agent, Sandbox, compact, publish, wait_until

pytestmark = pytest.mark.kernel

WEB = "10.96.0.10"
ONE, TWO = "127.0.0.1:7001", "127.0.0.1:7002"
SHOW_CURSOR, HIDE_CURSOR = b"\x1b[?25h", b"\x1b[?25l"


def state(*backends: str) -> str:
    return compact(web={"frontends": [f"{WEB}:80"], "backends": list(backends)})


class Node(NamedTuple):
    sandbox: Sandbox
    agent: Agent

    def become(self, *backends: str) -> None:
        publish(self.sandbox.directory / "services.yaml", state(*backends))

        def installed() -> bool:
            rows = json.loads(self.sandbox.sockhop("get", "backends", "-o", "json").stdout)
            return {row["backend"] for row in rows} == set(backends)

        wait_until(installed, f"the backends {backends}")


@pytest.fixture(scope="module")
def node() -> Iterator[Node]:
    with (
        Sandbox() as made,
        socket.create_server(("127.0.0.1", 7001), backlog=64),
        made.agent(made.manifest(state(ONE))) as agent,
    ):
        yield Node(made, agent)


class Watcher:
    """A running `get --watch`, with what it has written so far."""

    def __init__(self, sandbox: Sandbox, *arguments: str, terminal: int | None = None) -> None:
        """*terminal*: write to a terminal of so many lines, instead of to a pipe."""
        if terminal is None:
            self._output, output = os.pipe()
        else:
            self._output, output = pty.openpty()
            size = struct.pack("=HHHH", terminal, 100, 0, 0)
            fcntl.ioctl(output, termios.TIOCSWINSZ, size)
        self.text = b""
        self.process = subprocess.Popen(
            ["env", "--default-signal=INT", SOCKHOP, "get", *arguments, "--watch",
             "--interval", "100ms"],
            env=sandbox.environment | {"TERM": "xterm"}, stdin=subprocess.DEVNULL,
            stdout=output, stderr=subprocess.PIPE,
        )  # fmt: skip
        os.close(output)

    def read(self, enough: Callable[[bytes], Any], seconds: float = 20) -> Any:
        """Read until *enough* is true of all that has been written."""
        end = time.monotonic() + seconds
        while not (result := enough(self.text)):
            left = end - time.monotonic()
            if left <= 0 or not select.select([self._output], [], [], left)[0]:
                pytest.fail(f"not within {seconds} s; so far: {self.text!r}")
            data = self._more()
            if not data:
                pytest.fail(f"it ended; so far: {self.text!r}")
            self.text += data
        return result

    def end(self, number: int | None = None) -> int:
        """Wait for the end, after a signal, and return the exit status."""
        if number is not None:
            self.process.send_signal(number)
        while data := self._more():
            self.text += data
        status = self.process.wait(20)
        os.close(self._output)
        assert self.process.stderr
        with self.process.stderr as complaints:
            assert complaints.read() == b""
        return status

    def _more(self) -> bytes:
        with contextlib.suppress(OSError):  # EIO: nobody has the terminal any more
            return os.read(self._output, 1 << 16)
        return b""


def lines(text: bytes) -> list[list[str]]:
    return [line.split() for line in text.decode().splitlines()]


def test_changes_are_appended(node: Node) -> None:
    node.become(ONE)
    watcher = Watcher(node.sandbox, "backends")
    watcher.read(lambda text: text.count(b"\n") == 2)
    node.become(ONE, TWO)
    watcher.read(lambda text: text.count(b"\n") == 3)
    node.become(ONE)
    with socket.create_connection((WEB, 80)):
        watcher.read(lambda text: text.count(b"\n") == 5)
    watcher.read(lambda text: text.count(b"\n") == 6)
    assert watcher.end(signal.SIGINT) == 0
    assert lines(watcher.text) == [
        ["EVENT", "SERVICE", "BACKEND", "PROTOCOL", "STATE", "WEIGHT", "LIVE"],
        ["added", "web", ONE, "TCP", "active", "1", "0"],
        ["added", "web", TWO, "TCP", "active", "1", "0"],
        ["gone", "web", TWO, "TCP", "active", "1", "0"],
        ["changed", "web", ONE, "TCP", "active", "1", "1"],
        ["changed", "web", ONE, "TCP", "active", "1", "0"],
    ]
    # The columns stay where they are.
    assert len({line.index(b"TCP") for line in watcher.text.splitlines()[1:]}) == 1


def test_a_socket_that_only_grows_older_has_not_changed(node: Node) -> None:
    node.become(ONE)
    with socket.create_connection((WEB, 80)) as client:
        local = ":".join(map(str, client.getsockname()))
        watcher = Watcher(node.sandbox, "sockets", "--count", "25")
        watcher.read(lambda text: b"added" in text)
        time.sleep(1.2)
    assert watcher.end() == 0
    first, last = lines(watcher.text)[1], lines(watcher.text)[-1]
    assert (first[0], last[0]) == ("added", "gone")
    assert len(lines(watcher.text)) <= 4  # it may have been seen half closed
    assert first[3] == last[3] == local


@pytest.mark.parametrize("output", ["json", "yaml"])
def test_json_and_yaml(node: Node, output: str) -> None:
    node.become(ONE)
    watcher = Watcher(node.sandbox, "backends", "-o", output)
    watcher.read(lambda text: b"added" in text and text.endswith(b"\n"))
    node.become(TWO)
    watcher.read(lambda text: b"gone" in text and text.endswith(b"\n"))
    assert watcher.end(signal.SIGTERM) == 128 + signal.SIGTERM
    node.become(ONE)
    if output == "json":
        events = [json.loads(line) for line in watcher.text.splitlines()]
    else:
        events = list(yaml.safe_load_all(watcher.text))
    assert sorted((each["event"], each["backend"]) for each in events) == [
        ("added", ONE), ("added", TWO), ("gone", ONE)]  # fmt: skip
    assert {each["service"] for each in events} == {"web"}


def test_a_terminal_is_kept_current_and_left_clean(node: Node) -> None:
    node.become(ONE)
    for number, status in ((signal.SIGINT, 0), (signal.SIGTERM, 143)):
        watcher = Watcher(node.sandbox, "backends", terminal=24)
        watcher.read(lambda text: text.count(ONE.encode()) >= 2)
        assert watcher.text.startswith(HIDE_CURSOR)
        node.become(TWO)
        watcher.read(lambda text: TWO.encode() in text)
        assert watcher.end(number) == status
        node.become(ONE)
        # Every table stands where the one before it stood; the last one stays, with a cursor.
        assert b"\x1b[1A" in watcher.text
        frames = watcher.text.split(b"SERVICE")
        assert ONE.encode() in frames[1]
        assert TWO.encode() in frames[-1]
        assert ONE.encode() not in frames[-1]
        assert watcher.text.rstrip().endswith(SHOW_CURSOR)
        assert b"EVENT" not in watcher.text


def test_a_terminal_with_few_lines(node: Node) -> None:
    node.become(*[f"127.0.0.1:{port}" for port in range(7001, 7021)])
    try:
        watcher = Watcher(node.sandbox, "backends", "--count", "3", terminal=8)
        assert watcher.end() == 0
    finally:
        node.become(ONE)
    frames = watcher.text.split(b"SERVICE")[1:]
    assert [frame.count(b"TCP") for frame in frames[:-1]] == [6] * (len(frames) - 1)
    assert re.search(rb"\.\.\.", frames[0])


def test_an_end_of_balancing_is_seen_and_a_new_beginning(sandbox: Sandbox) -> None:
    path = sandbox.manifest(state(ONE))
    with sandbox.agent(path):
        watcher = Watcher(sandbox, "backends")
        watcher.read(lambda text: b"added" in text)
    sandbox.sockhop("detach")
    watcher.read(lambda text: b"gone" in text)
    with sandbox.agent(path):
        watcher.read(lambda text: text.count(b"added") == 2)
    assert watcher.end(signal.SIGINT) == 0


def test_what_cannot_be_watched(sandbox: Sandbox) -> None:
    def says(*arguments: str) -> tuple[int, str]:
        result = sandbox.sockhop("get", "backends", *arguments, check=False)
        return result.returncode, result.stderr

    status, said = says("--watch")
    assert (status, "nothing is installed" in said) == (3, True)
    for interval in ("0", "0s", "-1s", "soon", "1d", ""):
        status, said = says("--watch", "--interval", interval)
        assert (status, "no duration" in said or "requires" in said) == (2, True), interval
    assert says("--count", "3")[0] == 2
    assert says("--watch", "--count", "0")[0] == 2
