"""The steps of `sockhop demo`, and how they are shown."""

import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console

from sockhop.cli.demo_loop import ClientLoop
from sockhop.cli.demo_stage import Stage, wait_until
from sockhop.errors import SockhopError

__all__ = ["Demo", "Screen"]

_FRONTEND = "10.96.0.10:80"
_URL = "http://10.96.0.10"
_PORTS = {"one": 8081, "two": 8082}
_CURLS = 20
_ANSWERS = 400  # wanted in each of the loop's phases
_CONNECTS = 1000  # fewer in all would show nothing


class Screen:
    """Writes lines; on a terminal a spinner too, while something is waited for."""

    def __init__(self) -> None:
        self._console = Console(soft_wrap=True, highlight=False, markup=False, emoji=False)
        self._steps = 0

    def say(self, *lines: str) -> None:
        for line in lines:
            self._console.print(line)

    def step(self, text: str) -> None:
        self._steps += 1
        self._console.print(f"{self._steps:2}. {text}", style="bold")

    def ran(self, command: str, output: str = "") -> None:
        self._console.print(f"      $ {command}", style="cyan")
        self.show(output)

    def show(self, text: str) -> None:
        for line in text.splitlines():
            self._console.print(f"      {line}")

    def restore(self) -> None:
        """Give the terminal its cursor back; a spinner that was cut off may have kept it."""
        self._console.show_cursor()

    @contextmanager
    def waiting(self, text: str) -> Iterator[None]:
        if not self._console.is_terminal:
            yield
            return
        with self._console.status(text):
            yield


class Demo:
    """The steps. Each raises SockhopError where it does not see what it promises."""

    def __init__(self, stage: Stage, screen: Screen) -> None:
        self._stage = stage
        self._screen = screen
        self._servers: dict[str, subprocess.Popen[bytes]] = {}

    def play(self) -> None:
        self._open()
        self._show_untouched("nobody listens at the service's address yet")
        agent = self._start_agent()
        self._count_backends()
        self._show_kernel()
        self._show_no_proxy()
        self._replace_under_load()
        self._stop_agent(agent)
        status = self._sockhop("detach").strip()
        self._screen.step(f"`sockhop detach`: {status}")
        self._show_untouched("and the service's address is an address like any other again")

    def next_steps(self) -> list[str]:
        """Return lines for those who want to go on."""
        sockhop = "sockhop" if shutil.which("sockhop") else os.path.relpath(sys.argv[0])
        return [
            "",
            "Next, on this machine itself (as root):",
            "  cat >services.yaml <<'END'",
            *_manifest("one", "two").splitlines(),
            "END",
            "  # put your own servers in its list of backends, then",
            f"  {sockhop} render -f services.yaml     # what it means; touches no kernel",
            f"  {sockhop} agent -f services.yaml      # balances all processes, follows the file",
            "  # and in a second terminal",
            f"  curl {_URL}/",
            f"  {sockhop} status",
            f"  {sockhop} get sockets",
            f"  {sockhop} detach                      # after the agent: the end of balancing",
            "docs/manual.md explains each command, docs/architecture.md how it works.",
        ]

    def _open(self) -> None:
        stage, screen = self._stage, self._screen
        screen.say(
            f"sockhop on Linux {platform.release()}: a connect() to a service goes to a backend, "
            "in the kernel, at the socket.",
            "This takes some seconds and touches nothing outside its own namespace and cgroup; "
            "Ctrl-C ends it cleanly.",
            "",
        )
        screen.step(
            f"a stage: a network namespace with lo alone, the cgroup {stage.cgroup}, "
            f"pins in {stage.pins}"
        )
        for name in _PORTS:
            self._start_server(name)
        screen.step(
            "two HTTP servers: "
            + ", ".join(f"backend {name} on 127.0.0.1:{port}" for name, port in _PORTS.items())
        )
        for name, port in _PORTS.items():
            screen.ran(f"python3 -m http.server {port} --bind 127.0.0.1 --directory {name} &")

    def _show_untouched(self, why: str) -> None:
        status, output = self._stage.run("curl", "-sS", f"{_URL}/")
        if not status:
            raise SockhopError(f"{_URL}/ answers though nothing balances: {output}")
        self._screen.step(f"without sockhop: {why}")
        self._screen.ran(f"curl -sS {_URL}/", output)

    def _start_agent(self) -> subprocess.Popen[bytes]:
        self._write_manifest("one", "two")
        self._screen.step("the service, in services.yaml")
        self._screen.show((self._stage.directory / "services.yaml").read_text())
        begin = time.monotonic()
        with self._screen.waiting("starting the agent"):
            agent = self._stage.start_agent("services.yaml")
        self._screen.step(f"the agent is ready after {time.monotonic() - begin:.1f} s")
        self._screen.ran("sockhop agent -f services.yaml &")
        return agent

    def _count_backends(self) -> None:
        answers = Counter(self._curl() for _ in range(_CURLS))
        if set(answers) != {f"backend {name}" for name in _PORTS}:
            raise SockhopError(f"{_CURLS} times curl had only these answers: {dict(answers)}")
        counts = ", ".join(f"{answer} {n} times" for answer, n in sorted(answers.items()))
        self._screen.step(f"curl is served; in {_CURLS} calls: {counts}")
        self._screen.ran(f"curl -sS {_URL}/", self._curl())

    def _show_kernel(self) -> None:
        self._screen.step("what the kernel holds now")
        for arguments in (("get", "services", "-o", "wide"), ("get", "backends")):
            self._screen.ran("sockhop " + " ".join(arguments), self._sockhop(*arguments))
        self._screen.show(
            "(Two rows for one frontend: backends on loopback hold in one namespace only, here; "
            "elsewhere it has none.)"
        )

    def _show_no_proxy(self) -> None:
        command = ("curl", "-sN", f"telnet://{_FRONTEND}")
        client = self._stage.start(*command, stdin=subprocess.PIPE)
        table = ""

        def connected() -> bool:
            nonlocal table
            table = self._stage.run("ss", "-tnpO")[1]
            rows = [line.split() for line in table.splitlines()]
            ends = {tuple(row[3:5]): row[5] for row in rows if len(row) > 5}
            return any(
                f"pid={client.pid}," in process
                and f"pid={self._servers[name].pid}," in ends.get((peer, local), "")
                for (local, peer), process in ends.items()
                for name in _PORTS
            )

        with self._screen.waiting("looking for the client's socket"):
            wait_until(connected, "ss showed curl and a backend as the ends of one connection")
        self._screen.step("no proxy: an open connection goes from curl straight to a backend")
        self._screen.ran(" ".join(command) + " &")
        self._screen.ran("ss -tnpO", table)
        self._screen.ran("sockhop get sockets", self._sockhop("get", "sockets"))
        self._screen.ran("ss -tln", self._stage.run("ss", "-tln")[1])
        client.kill()
        client.wait()
        self._screen.step("curl itself sees the service's address: getpeername() gives it")
        seen = " from %{remote_ip}:%{remote_port}"
        self._screen.ran(f"curl -sS -w '{seen}' {_URL}/", self._curl("-w", seen))

    def _replace_under_load(self) -> None:
        stage, screen = self._stage, self._screen
        loop = ClientLoop(stage, _URL)
        screen.step("a client loop: curl, a new connection for each request")
        screen.ran(loop.command)
        with screen.waiting("the client loop runs"):
            loop.wait_answers(_ANSWERS)
            loop.enter("leaving")
            self._take_away("two")
            loop.enter("alone")
            loop.wait_answers(_ANSWERS)
        self._start_server("two")
        loop.enter("back")
        loop.wait_answers(1)  # the last batch of `alone` has ended
        begin = time.monotonic()
        self._write_manifest("one", "two")
        with screen.waiting("the client loop runs"):
            wait_until(lambda: len(self._installed()) == len(_PORTS), "two was installed again")
            took = time.monotonic() - begin
            loop.wait_answers(_ANSWERS)
            loop.end()
        screen.step(f"meanwhile, one served alone: {loop.answers('alone')}")
        screen.step(
            f"two was started again and added to services.yaml: in force within {took:.1f} s"
        )
        screen.show(f"since then: {loop.answers('back')}")
        self._judge(loop)

    def _take_away(self, name: str) -> None:
        begin = time.monotonic()
        self._write_manifest(*(other for other in _PORTS if other != name))
        wait_until(lambda: len(self._installed()) < len(_PORTS), f"{name} was not installed")
        took = time.monotonic() - begin
        backend = f"127.0.0.1:{_PORTS[name]}"
        wait_until(
            lambda: all(
                row["backend"] != backend
                for row in json.loads(self._sockhop("get", "sockets", "-o", "json"))
            ),
            f"no socket was connected to {name}",
        )
        self._servers[name].kill()
        self._servers[name].wait()
        self._screen.step(
            f"{name} taken out of services.yaml while the loop runs: in force within {took:.1f} s; "
            "its last connection has ended, its server is killed"
        )
        self._screen.ran("sockhop get backends", self._sockhop("get", "backends"))

    def _judge(self, loop: ClientLoop) -> None:
        total, alone = loop.answers(*loop.phases), loop.answers("alone")
        self._screen.step(f"the client loop in all: {total}")
        if total.failures:
            raise SockhopError("connects of the client loop failed: that must not be")
        if set(alone.backends) != {"one"} or "two" not in loop.answers("back").backends:
            raise SockhopError("backend two did not leave and come back as it should")
        if total.connects < _CONNECTS:
            raise SockhopError(f"the client loop made fewer than {_CONNECTS:,} connects")

    def _stop_agent(self, agent: subprocess.Popen[bytes]) -> None:
        agent.send_signal(signal.SIGTERM)
        wait_until(lambda: agent.poll() is not None, "the agent stopped")
        answer = self._curl()
        self._screen.step("the agent is stopped: the kernel goes on balancing without it")
        self._screen.ran(f"curl -sS {_URL}/", answer)

    # --- parts --------------------------------------------------------------------------------

    def _write_manifest(self, *names: str) -> None:
        self._stage.write("services.yaml", _manifest(*names))

    def _start_server(self, name: str) -> None:
        port, directory = str(_PORTS[name]), self._stage.directory / name
        directory.mkdir(exist_ok=True)
        (directory / "index.html").write_text(f"backend {name}")
        server = self._stage.start(
            *(sys.executable, "-m", "http.server", port, "--bind", "127.0.0.1"),
            *("--directory", name),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        self._servers[name] = server
        url = f"http://127.0.0.1:{port}/"
        wait_until(lambda: self._stage.run("curl", "-s", url)[0] == 0, f"{url} answered")

    def _curl(self, *options: str) -> str:
        status, output = self._stage.run("curl", "-sS", "--max-time", "5", *options, f"{_URL}/")
        if status:
            raise SockhopError(f"`curl -sS {_URL}/` ended with {status}", hint=output)
        return output

    def _sockhop(self, *arguments: str) -> str:
        return self._stage.sockhop(*arguments)

    def _installed(self) -> list[object]:
        rows: list[object] = json.loads(self._sockhop("get", "backends", "-o", "json"))
        return rows


def _manifest(*names: str) -> str:
    backends = ", ".join(f'"127.0.0.1:{_PORTS[name]}"' for name in names)
    return (
        "version: 1\n"
        "services:\n"
        "  - name: web\n"
        f'    frontends: ["{_FRONTEND}"]\n'
        f"    backends: [{backends}]\n"
    )
