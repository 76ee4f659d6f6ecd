"""Where `sockhop bench` works: rooms, each a network namespace and a cgroup of its own.

A room has only `lo`, so nothing that is dialled there leaves the machine. It lives as long as its
processes, which are in its cgroup from their first instruction. Everything else has a name that
is known before it exists: :meth:`Site.clear` removes it all at any moment, also what a killed
benchmark has left.
"""

import os
import select
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from sockhop.bench.messages import Answer, Request
from sockhop.datapath.balancer import remove_pins
from sockhop.errors import SockhopError, SystemLackError
from sockhop.kernel import netns
from sockhop.kernel.bpffs import require_bpffs

__all__ = ["Cpus", "Room", "Site", "Worker", "prefer"]

_JOIN = 'echo $$ > "$0/cgroup.procs" && exec "$@"'
_WORKER = (sys.executable, "-P", "-m", "sockhop.bench.worker")
_PATIENCE = 60.0
"""Seconds within which every request is answered."""


class Cpus(NamedTuple):
    """To which CPUs the clients are pinned, and the servers with whatever stands in between."""

    client: int
    server: int

    @classmethod
    def ours(cls) -> "Cpus":
        """The last and the first that this process may use."""
        allowed = sorted(os.sched_getaffinity(0))
        return cls(allowed[-1], allowed[0])


class Worker:
    """A running :mod:`sockhop.bench.worker`."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.pid = process.pid
        self._process = process
        self.receive()

    def ask(self, request: Request) -> Answer:
        """Send a request and return the answer."""
        self.send(request)
        return self.receive()

    def send(self, request: Request) -> None:
        """Send a request; its answer has to be received before the next."""
        assert self._process.stdin
        with suppress(BrokenPipeError):  # receive() says what it died of
            self._process.stdin.write(msgspec.json.encode(request) + b"\n")
            self._process.stdin.flush()

    def receive(self) -> Answer:
        """Return the answer to the last request; SockhopError where it failed."""
        assert self._process.stdout
        if not select.select([self._process.stdout], [], [], _PATIENCE)[0]:
            raise SockhopError(f"a worker gave no answer within {_PATIENCE:g} s")
        line = self._process.stdout.readline()
        if not line:
            raise SockhopError(f"a worker ended with status {self._process.wait()}")
        answer = msgspec.json.decode(line, type=Answer)
        if answer.error:
            raise SockhopError(answer.error)
        return answer


class Room:
    """A network namespace and a cgroup with a server and a client in them."""

    def __init__(self, cgroup: Path, directory: Path, cpus: Cpus) -> None:
        self.cgroup = cgroup
        self.cpus = cpus
        self._directory = directory
        self.cgroup.mkdir()
        self.server = Worker(self._start_worker(cpus.server, "new"))
        self.netns = Path(f"/proc/{self.server.pid}/ns/net")
        self.run("ip", "link", "set", "lo", "up")
        self.client = Worker(self.start(*_WORKER, str(cpus.client), **_PIPES))

    def far_client(self) -> Worker:
        """Return a client in a network namespace of its own."""
        return Worker(self._start_worker(self.cpus.client, "new"))

    def start(self, *command: str, **options: Any) -> subprocess.Popen[bytes]:
        """Start a command here, out of reach of the terminal's Ctrl-C."""
        with netns.entered(self.netns):
            return self._start(*command, **options)

    def run(self, *command: str, text: str = "", seconds: float = _PATIENCE) -> str:
        """Run a command with *text* as its input; return its output.

        SockhopError where it fails, TimeoutError where it takes longer than *seconds*.
        """
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        process = self.start(*command, **pipes)
        try:
            output, _ = process.communicate(text.encode(), timeout=seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            raise TimeoutError from None
        shown = output.decode(errors="replace").strip()
        if process.returncode:
            raise SockhopError(f"`{' '.join(command)}` failed", hint=shown[:500])
        return shown

    def set_sysctl(self, name: str, value: str) -> None:
        """Set a sysctl of this namespace, by its path below /proc/sys."""
        self.run("sh", "-c", 'echo "$1" > "/proc/sys/$0"', name, value)

    def close(self) -> None:
        """End all processes of the room, and with them the namespace."""
        _kill_all(self.cgroup)

    def _start_worker(self, cpu: int, *arguments: str) -> subprocess.Popen[bytes]:
        return self._start(*_WORKER, str(cpu), *arguments, **_PIPES)

    def _start(self, *command: str, **options: Any) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            ["sh", "-c", _JOIN, str(self.cgroup), *command],
            cwd=self._directory,
            start_new_session=True,
            stdin=options.pop("stdin", subprocess.DEVNULL),
            **options,
        )
        prefer(process.pid)
        return process


_PIPES = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}


class Site:
    """All that a benchmark makes: a cgroup with its rooms, pins, a directory for files."""

    def __init__(self, name: str, cgroup: Path, pins: Path) -> None:
        self.name = name
        self.cgroup = cgroup
        self.pins = pins
        self.directory = Path("/run") / name
        self.cpus = Cpus.ours()

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """Run the body as the only benchmark of this name; SystemLackError if there is another."""
        # An abstract address (unix(7)): it goes with the process, however that ends.
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as claim:
            try:
                claim.bind(f"\0{self.name}")
            except OSError:
                raise SystemLackError(
                    "another benchmark is running on this machine", hint="wait until it ends"
                ) from None
            yield

    def build(self) -> None:
        """Make the cgroup and the directory, after clearing what another has left."""
        require_bpffs(self.pins)
        self.clear()
        try:
            self.directory.mkdir(mode=0o700)
            self.cgroup.mkdir()
        except OSError as error:
            raise SystemLackError(f"{error.filename}: {error.strerror}") from None

    @contextmanager
    def room(self, name: str) -> Iterator[Room]:
        """Make a room and run the body, which may use it."""
        room = Room(self.cgroup / name, self.directory, self.cpus)
        try:
            yield room
        finally:
            room.close()

    def clear(self) -> list[str]:
        """Remove all that is there; return a line for each thing that could not be removed."""
        problems = []
        for remove in (
            self._remove_cgroup,
            self._remove_pins,
            self._remove_directory,
            self._remove_namespaces,
        ):
            try:
                remove()
            except (OSError, SockhopError) as error:
                problems.append(str(error))
        return problems

    def _remove_cgroup(self) -> None:
        for room in sorted(self.cgroup.glob("*/")):
            _kill_all(room)
        if self.cgroup.is_dir():
            self.cgroup.rmdir()

    def _remove_pins(self) -> None:
        if self.pins.is_dir():
            remove_pins(self.pins)

    def _remove_directory(self) -> None:
        if self.directory.exists():
            shutil.rmtree(self.directory)

    def _remove_namespaces(self) -> None:
        for path in Path("/run/netns").glob(f"{self.name}-*"):
            subprocess.run(["ip", "netns", "del", path.name], check=True)


def prefer(pid: int) -> None:
    """Give a process precedence: whatever else this machine does shall not be measured."""
    with suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, pid, -20)
        # Where sessions share the CPUs first, nice(2) counts only within one (sched(7)).
        Path(f"/proc/{pid}/autogroup").write_text("-20")


def _kill_all(cgroup: Path) -> None:
    """Kill all processes of a cgroup and remove it."""
    end = time.monotonic() + 10
    while cgroup.is_dir():
        # Linux kernel commit 661ee6280931 ("cgroup: introduce cgroup.kill") (in v5.14).
        with suppress(FileNotFoundError):
            (cgroup / "cgroup.kill").write_text("1")
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        try:
            cgroup.rmdir()
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.005)
