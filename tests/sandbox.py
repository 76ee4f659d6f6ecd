"""A network namespace, a cgroup and a bpffs directory of a test's own, and an agent in them.

Nothing here has a route out, so a connect that is not translated fails at once.
"""

import contextlib
import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sockhop.kernel import netns
from sockhop.kernel.cgroups import cgroup_root

__all__ = ["Agent", "Sandbox", "ServerThread", "compact", "wait_until"]

SOCKHOP = Path(sys.executable).with_name("sockhop")
_numbers = itertools.count()


def wait_until(true: Callable[[], Any], what: str, seconds: float = 10) -> Any:
    """Return the first true result of *true*; fail the test if there is none in time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if result := true():
            return result
        time.sleep(0.005)
    pytest.fail(f"not within {seconds} s: {what}")


def compact(**services: dict[str, Any]) -> str:
    """Return a compact manifest of *services* by name, as JSON (which is YAML)."""
    return json.dumps(
        {"version": 1, "services": [{"name": n, **fields} for n, fields in services.items()]}
    )


def publish(path: Path, text: str) -> None:
    """Write a manifest as careful tools do: aside, then renamed over."""
    aside = path.with_name(f".{path.name}.new")
    aside.write_text(text)
    aside.rename(path)


class ServerThread:
    """A TCP or UDP server that answers everything with its own name."""

    def __init__(self, name: str, address: str, port: int = 0, *, udp: bool = False) -> None:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        kind = socket.SOCK_DGRAM if udp else socket.SOCK_STREAM
        self.name = name
        self._socket = socket.socket(family, kind)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._socket.bind((address, port))
        self.address, self.port = self._socket.getsockname()[:2]
        if not udp:
            self._socket.listen(4096)
        serve = self._serve_udp if udp else self._serve_tcp
        self._thread = threading.Thread(target=serve, daemon=True)
        self._thread.start()

    @property
    def endpoint(self) -> str:
        host = f"[{self.address}]" if ":" in self.address else self.address
        return f"{host}:{self.port}"

    def _serve_tcp(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._socket.accept()
                with connection, contextlib.suppress(OSError):
                    connection.sendall(self.name.encode())

    def _serve_udp(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                _, sender = self._socket.recvfrom(2048)
                if sender is None:  # close() has shut it down
                    return
                self._socket.sendto(self.name.encode(), sender)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self._thread.join(5)

    def __enter__(self) -> "ServerThread":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Agent:
    """A running `sockhop agent`."""

    def __init__(self, sandbox: "Sandbox", arguments: tuple[str, ...]) -> None:
        self._sandbox = sandbox
        self._ready = False
        self.log = sandbox.directory / f"agent-{next(_numbers)}.log"
        self.notified = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        notify_path = sandbox.directory / f"notify-{next(_numbers)}"
        self.notified.bind(str(notify_path))
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                sandbox.inside(str(SOCKHOP), "agent", *arguments),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=sandbox.environment | {"NOTIFY_SOCKET": str(notify_path)},
            )

    def wait_ready(self, seconds: float = 60) -> "Agent":
        self.notified.settimeout(seconds)
        try:
            while not self._ready:
                self._ready = "READY=1" in self.notified.recv(4096).decode().split("\n")
        except TimeoutError:
            pytest.fail(f"the agent is not ready after {seconds} s:\n{self.log.read_text()}")
        return self

    def status(self) -> dict[str, Any]:
        result = self._sandbox.sockhop("status", "-o", "json", check=False)
        agent: dict[str, Any] = json.loads(result.stdout)["agent"]
        return agent

    def wait_generation(self, above: int) -> int:
        return int(
            wait_until(
                lambda: (n := self.status()["generation"]) > above and n,
                f"a generation above {above}",
            )
        )

    def stop(self, number: int = signal.SIGTERM, seconds: float = 20) -> int:
        if self.process.poll() is None:
            self.process.send_signal(number)
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(seconds)
            pytest.fail(f"the agent did not stop:\n{self.log.read_text()}")
        finally:
            self.notified.close()


class Sandbox:
    """See the module. Use as a context manager; the body runs inside, so its sockets are there."""

    def __init__(self, *, loopback: tuple[str, ...] = ()) -> None:
        self.name = f"sockhop-test-{os.getpid()}-{next(_numbers)}"
        self.netns = Path("/run/netns") / self.name
        self.cgroup = cgroup_root() / self.name
        self.pins = Path("/sys/fs/bpf") / self.name
        self.directory = Path(tempfile.mkdtemp(prefix=f"{self.name}-"))
        self.api = self.directory / "api.sock"
        self._loopback = loopback
        self._stack = contextlib.ExitStack()
        self._agents: list[Agent] = []

    @property
    def environment(self) -> dict[str, str]:
        return os.environ | {
            "SOCKHOP_CGROUP": str(self.cgroup),
            "SOCKHOP_BPFFS": str(self.pins),
            "SOCKHOP_API": str(self.api),
            "SOCKHOP_TRACEBACK": "1",
        }

    def inside(self, *command: str) -> list[str]:
        """Return a command line that runs *command* in the namespace and the cgroup."""
        # Not `ip netns exec`: it mounts a new /sys, without the bpffs.
        join = 'echo $$ > "$0/cgroup.procs" && exec "$@"'
        return [
            "nsenter", f"--net={self.netns}", "sh", "-c", join, str(self.cgroup), *command
        ]  # fmt: skip

    def run(self, *command: str, check: bool = True, **options: Any) -> Any:
        """Run a command inside to its end."""
        options = {"timeout": 60, "capture_output": True, "text": True} | options
        options.setdefault("env", self.environment)
        result = subprocess.run(self.inside(*command), check=False, **options)
        if check and result.returncode:
            pytest.fail(f"{command}: exit {result.returncode}\n{result.stdout}{result.stderr}")
        return result

    def sockhop(self, *arguments: str, check: bool = True, **options: Any) -> Any:
        return self.run(str(SOCKHOP), *arguments, check=check, **options)

    def start_agent(self, *arguments: str) -> Agent:
        """Start an agent, not waiting for it."""
        agent = Agent(self, arguments)
        self._agents.append(agent)
        return agent

    @contextlib.contextmanager
    def agent(self, manifest: Path, *arguments: str) -> Iterator[Agent]:
        """Run an agent that follows *manifest* while the body runs."""
        agent = self.start_agent("-f", str(manifest), *arguments)
        try:
            yield agent.wait_ready()
        finally:
            agent.stop()

    def manifest(self, text: str, name: str = "services.yaml") -> Path:
        path = self.directory / name
        publish(path, text)
        return path

    def __enter__(self) -> "Sandbox":
        try:
            self._make()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _make(self) -> None:
        self._stack.callback(shutil.rmtree, self.directory, ignore_errors=True)
        subprocess.run(["ip", "netns", "add", self.name], check=True)
        self._stack.callback(subprocess.run, ["ip", "netns", "del", self.name], check=False)
        ip = ["ip", "-n", self.name]
        subprocess.run([*ip, "link", "set", "lo", "up"], check=True)
        for address in self._loopback:
            subprocess.run([*ip, "addr", "add", address, "dev", "lo"], check=True)
        self.cgroup.mkdir()
        self._stack.callback(self._remove_cgroup)
        self._stack.callback(self._detach)
        before = cgroup_root() / Path("/proc/self/cgroup").read_text().rpartition("::/")[2].strip()
        (self.cgroup / "cgroup.procs").write_text(str(os.getpid()))
        self._stack.callback((before / "cgroup.procs").write_text, str(os.getpid()))
        self._stack.enter_context(netns.entered(self.netns))

    def _detach(self) -> None:
        for agent in self._agents:
            if agent.process.poll() is None:
                agent.process.kill()
                agent.process.wait(10)
            agent.notified.close()
        if self.pins.exists():
            subprocess.run([SOCKHOP, "detach"], env=self.environment, check=True, timeout=60,
                           stdout=subprocess.DEVNULL)  # fmt: skip

    def _remove_cgroup(self) -> None:
        for pid in (self.cgroup / "cgroup.procs").read_text().split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        wait_until(lambda: not (self.cgroup / "cgroup.procs").read_text(), "an empty cgroup")
        self.cgroup.rmdir()

    def __exit__(self, *_: object) -> None:
        self._stack.close()
