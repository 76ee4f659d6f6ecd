"""Where `sockhop demo` plays: a network namespace, a cgroup, pins and files of its own.

Everything on the stage has a name that is known before it exists, and every process is in the
cgroup from its first instruction. So :meth:`Stage.clear` needs no memory of what was made: it
removes all of it at any moment, also what a killed demo has left.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from sockhop.datapath.balancer import remove_pins
from sockhop.errors import SockhopError, SystemLackError
from sockhop.kernel import netns

__all__ = ["Stage", "StopRequested", "perform", "wait_until"]

_STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_JOIN = 'echo $$ > "$0/cgroup.procs" && exec "$@"'
_File = int | IO[bytes]
_OURSELVES = (sys.executable, "-c", "from sockhop.cli.main import main; main()")


class StopRequested(BaseException):
    """Somebody asks us to stop: `number` is the signal."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def perform(play: Callable[[], None], clear: Callable[[], None]) -> None:
    """Call *play*, then *clear*, once, however *play* ends.

    SIGINT, SIGTERM and SIGHUP end *play* with StopRequested; from then on they are ignored.
    """
    deaf = False

    def stop(number: int, _: object) -> None:
        nonlocal deaf
        if not deaf:
            deaf = True
            raise StopRequested(number)

    # What is ignored (nohup) stays so.
    heeded = [n for n in _STOPPING if signal.getsignal(n) is not signal.SIG_IGN]
    for number in heeded:
        signal.signal(number, stop)
    try:
        try:
            play()
        finally:
            deaf = True
    finally:
        clear()
        for number in heeded:
            signal.signal(number, signal.SIG_IGN)


def wait_until(true: Callable[[], Any], what: str, seconds: float = 10) -> float:
    """Wait for *true* to return something true; return how many seconds that took."""
    begin = time.monotonic()
    while not true():
        if time.monotonic() - begin > seconds:
            raise SockhopError(f"the demo waited {seconds:g} s in vain until {what}")
        time.sleep(0.02)
    return time.monotonic() - begin


class Stage:
    """See the module; *cgroup* and *pins* are the paths of what it makes."""

    def __init__(self, name: str, cgroup: Path, pins: Path) -> None:
        self.name = name
        self.cgroup = cgroup
        self.pins = pins
        self.directory = Path("/run") / name
        # Neither a proxy nor a .curlrc of the user's: the commands do just what they show.
        kept = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy")}
        self._environment = kept | {
            "HOME": str(self.directory),
            "CURL_HOME": str(self.directory),
            "XDG_CONFIG_HOME": str(self.directory),
            "SOCKHOP_CGROUP": str(cgroup),
            "SOCKHOP_BPFFS": str(pins),
            "SOCKHOP_API": str(self.directory / "api.sock"),
        }

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """Run the body as the only demo of this name; SystemLackError while there is another."""
        # An abstract address (unix(7)): it goes with the process, however that ends.
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as claim:
            try:
                claim.bind(f"\0{self.name}")
            except OSError:
                raise SystemLackError(
                    "another demo is running on this machine", hint="wait until it ends"
                ) from None
            yield

    @contextmanager
    def built(self) -> Iterator[None]:
        """Make the cgroup and the files; run the body in a network namespace with only lo."""
        try:
            self.directory.mkdir(mode=0o700)
            self.cgroup.mkdir()
        except OSError as error:
            raise SystemLackError(f"{error.filename}: {error.strerror}") from None
        script = "ip link set lo up && echo up && exec cat"
        holder = self.start(
            *("unshare", "--net", "sh", "-c", script),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        answer = holder.stdout.readline().decode(errors="replace").strip()  # type: ignore[union-attr]
        if answer != "up":
            raise SystemLackError(
                f"no network namespace can be made here: {answer}",
                hint="the demo needs CAP_SYS_ADMIN and CAP_NET_ADMIN: "
                "in a container, run it with --privileged",
            )
        with netns.entered(Path(f"/proc/{holder.pid}/ns/net")):
            yield

    def clear(self) -> list[str]:
        """Remove all that is there; return a line for each thing that could not be removed."""
        problems = []
        for remove in (self._remove_cgroup, self._remove_pins, self._remove_directory):
            try:
                remove()
            except (OSError, SockhopError) as error:
                problems.append(str(error))
        return problems

    # --- running things -----------------------------------------------------------------------

    def start(
        self,
        *command: str,
        stdin: _File = subprocess.DEVNULL,
        stdout: _File = subprocess.DEVNULL,
        stderr: _File = subprocess.DEVNULL,
        **variables: str,
    ) -> subprocess.Popen[bytes]:
        """Start a command on the stage, out of reach of the terminal's Ctrl-C."""
        return subprocess.Popen(
            ["sh", "-c", _JOIN, str(self.cgroup), *command],
            cwd=self.directory,
            env=self._environment | variables,
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            start_new_session=True,
        )

    def run(self, *command: str) -> tuple[int, str]:
        """Run a command on the stage; return its exit status and what it printed, both streams."""
        process = self.start(*command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        try:
            output, _ = process.communicate(timeout=20)
        except subprocess.TimeoutExpired:
            raise SockhopError(f"`{' '.join(command)}` did not end within 20 s") from None
        return process.returncode, output.decode(errors="replace").rstrip("\n")

    def sockhop(self, *arguments: str, wanted: int = 0) -> str:
        """Run a command of sockhop's on the stage; SockhopError unless its status is *wanted*."""
        status, output = self.run(*_OURSELVES, *arguments)
        if status != wanted:
            raise SockhopError(f"`sockhop {' '.join(arguments)}` ended with {status}", hint=output)
        return output

    def start_agent(self, manifest: str) -> subprocess.Popen[bytes]:
        """Start the agent and wait until it is ready; SystemLackError with its log if it ends."""
        log, address = self.directory / "agent.log", self.directory / "notify"
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notified, log.open("wb") as out:
            notified.bind(str(address))
            notified.setblocking(False)
            agent = self.start(
                *(*_OURSELVES, "agent", "-f", manifest),
                stdout=out,
                stderr=out,
                NOTIFY_SOCKET=str(address),
            )

            def ready() -> bool:
                if agent.poll() is not None:
                    raise SystemLackError("the agent cannot run here", hint=log.read_text().strip())
                with suppress(BlockingIOError):
                    return b"READY=1" in notified.recv(4096)
                return False

            wait_until(ready, "the agent is ready", 30)
        return agent

    def write(self, name: str, text: str) -> None:
        """Write a file of the stage as careful editors do: aside, then renamed over."""
        aside = self.directory / f".{name}.new"
        aside.write_text(text)
        aside.rename(self.directory / name)

    # --- clearing -----------------------------------------------------------------------------

    def _remove_cgroup(self) -> None:
        # A process that was just started may join while we kill the others: so again and again.
        end = time.monotonic() + 10
        while self.cgroup.exists():
            with suppress(OSError):
                for pid in (self.cgroup / "cgroup.procs").read_text().split():
                    with suppress(ProcessLookupError):
                        os.kill(int(pid), signal.SIGKILL)
            with suppress(ChildProcessError):
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass
            try:
                self.cgroup.rmdir()
            except OSError:
                if time.monotonic() > end:
                    raise
                time.sleep(0.01)

    def _remove_pins(self) -> None:
        if self.pins.is_dir():
            remove_pins(self.pins)

    def _remove_directory(self) -> None:
        if self.directory.exists():
            shutil.rmtree(self.directory)
