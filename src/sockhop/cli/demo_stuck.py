"""`sockhop demo stuck`: connections that are established and hang; found, healed and avoided."""

import json
import subprocess
import sys
import time
from pathlib import Path

from sockhop.cli import demo_leak
from sockhop.cli.demo_play import Screen
from sockhop.cli.demo_stage import Stage, wait_until
from sockhop.datapath.vanilla import vanilla
from sockhop.errors import SockhopError
from sockhop.kernel.maps import map_info

__all__ = ["Stuck"]

_SERVER = ("127.0.0.1", 8080)
_FRONTEND = ("10.96.0.10", 80)
_PORTS = range(30000, 30064)
_LOST = _PORTS[::4]
"""The local ports of the clients that vanish."""
_VANISH = """
import socket, struct, sys
for port in map(int, sys.argv[3:]):
    with socket.socket() as client:
        client.bind(("127.0.0.1", port))
        client.connect((sys.argv[1], int(sys.argv[2])))
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
"""
_TRIES = 20
_MANY = 1000
_BRIEF, _LONG = "0.2", "2"
"""Seconds that an answer may take, where some will not come, and where all have to."""
_HEAD, _TAIL = 6, 4
"""Of a long output so many lines are shown."""
_MANIFEST = f"""\
version: 1
services:
  - name: web
    frontends: ["{_FRONTEND[0]}:{_FRONTEND[1]}"]
    backends: ["{_SERVER[0]}:{_SERVER[1]}"]
    splice: on
"""


class Stuck:
    """The steps. Each raises SockhopError where it does not see what it promises."""

    def __init__(self, stage: Stage, screen: Screen) -> None:
        self._stage = stage
        self._screen = screen

    def play(self) -> None:
        self._screen.say(
            "The TCP connection is established, and the request hangs: how that comes about, how "
            "it is found and healed.",
            "This takes some seconds and touches nothing outside its own namespace and cgroup; "
            "Ctrl-C ends it cleanly.",
            "",
        )
        self._open()
        with vanilla(self._stage.cgroup) as sockets:
            number = map_info(sockets).id
            self._screen.step(
                f"an accelerator, as Cilium up to 1.13 and many examples have it: map {number}, a "
                "sockhash by addresses and ports"
            )
            self._vanish(_SERVER)
            self._show_symptom()
            self._diagnose(number)
            self._heal(number)
        self._splice_well()

    def next_steps(self) -> list[str]:
        """Return lines for those who want to go on."""
        return [
            "",
            "Next, on a node where something hangs (as root; both only look, and need no agent):",
            "  sockhop doctor ADDRESS:PORT --http /health --count 100",
            "  sockhop audit",
            "docs/diagnose.md is the runbook, from the symptom to the cure.",
        ]

    def _open(self) -> None:
        stage, screen = self._stage, self._screen
        screen.step(
            "a stage: a network namespace with lo alone and "
            f"{len(_PORTS)} local ports, the cgroup {stage.cgroup}"
        )
        # /proc/sys/net is that of the one who opens it. In TIME-WAIT so few ports would run out.
        settings = Path("/proc/sys/net/ipv4")
        (settings / "ip_local_port_range").write_text(f"{_PORTS[0]} {_PORTS[-1]}")
        (settings / "tcp_max_tw_buckets").write_text("0")
        stage.start(sys.executable, str(Path(demo_leak.__file__)), str(_SERVER[1]))
        wait_until(lambda: self._curl()[0] == 0, "the server answered")
        screen.step(
            "a server with a common fault: it keeps the sockets of clients that reset their "
            "connection"
        )
        screen.ran(f"curl -sS {_url(_SERVER)}", "ok")

    def _vanish(self, target: tuple[str, int]) -> None:
        ends = (target[0], str(target[1]), *map(str, _LOST))
        status, text = self._stage.run(sys.executable, "-c", _VANISH, *ends)
        if status:
            raise SockhopError("the clients that are to vanish failed", hint=text)
        self._screen.step(
            f"{len(_LOST)} clients, on ports {_LOST[0]}, {_LOST[1]}, ... {_LOST[-1]}, reset their "
            "connections"
        )

    def _show_symptom(self) -> None:
        with self._screen.waiting("curl"):
            ends = [self._curl("--max-time", _BRIEF) for _ in range(_TRIES)]
        bad = [text for status, text in ends if status]
        if not 0 < len(bad) < _TRIES:
            raise SockhopError(f"{len(bad)} of {_TRIES} requests failed, and not some of them")
        self._screen.step(f"from now on some requests hang: {len(bad)} of {_TRIES}")
        self._screen.ran(f"curl -sS --max-time {_BRIEF} {_url(_SERVER)}", bad[0])

    def _diagnose(self, number: int) -> None:
        self._screen.step("the doctor, who makes connections and looks at those that hang")
        with self._screen.waiting("sockhop doctor"):
            text = self._doctor(_SERVER, _TRIES, _BRIEF, 1)
        _demand("stale sockmap entry", text)
        self._screen.step("the audit: each entry of the map against the socket that it holds")
        _demand(f"{len(_LOST)} stale entries", self._sockhop(1, "audit", "--id", str(number)))

    def _heal(self, number: int) -> None:
        self._screen.step("the cure: first what would be done, then do it")
        of = ("heal", "--id", str(number))
        _demand("nothing was changed", self._sockhop(1, *of))
        _demand("stale entries deleted", self._sockhop(0, *of, "--yes", "--lose-unread"))
        with self._screen.waiting("sockhop doctor"):
            self._doctor(_SERVER, _MANY, _LONG, 0)

    def _splice_well(self) -> None:
        stage, screen = self._stage, self._screen
        stage.write("services.yaml", _MANIFEST)
        screen.step("sockhop's own splicing, with the same server: entries are by socket cookie")
        screen.show(_MANIFEST)
        begin = time.monotonic()
        with screen.waiting("starting the agent"):
            stage.start_agent("services.yaml")
        screen.step(f"the agent is ready after {time.monotonic() - begin:.1f} s")
        self._vanish(_FRONTEND)
        with screen.waiting("sockhop doctor"):
            self._doctor(_FRONTEND, _MANY, _LONG, 0)
        self._show_spliced()

    def _show_spliced(self) -> None:
        command = ("curl", "-sN", f"telnet://{_FRONTEND[0]}:{_FRONTEND[1]}")
        client = self._stage.start(*command, stdin=subprocess.PIPE)
        with self._screen.waiting("looking for the client's socket"):
            wait_until(
                lambda: len(json.loads(self._stage.sockhop("get", "splices", "-o", "json"))) > 1,
                "both ends of a connection were spliced",
            )
        self._screen.step("both ends of an open connection are spliced")
        self._screen.ran(" ".join(command) + " &")
        self._sockhop(0, "get", "splices")
        client.kill()
        client.wait()

    # --- parts --------------------------------------------------------------------------------

    def _curl(self, *options: str) -> tuple[int, str]:
        return self._stage.run("curl", "-sS", *options, _url(_SERVER))

    def _doctor(self, target: tuple[str, int], count: int, seconds: str, status: int) -> str:
        asked = ("--http", "/health", "--count", str(count), "--timeout", f"{seconds}s", "--alone")
        return self._sockhop(status, "doctor", f"{target[0]}:{target[1]}", *asked)

    def _sockhop(self, status: int, *arguments: str) -> str:
        """Run and show a command that has to end with *status*; return what it printed."""
        text = self._stage.sockhop(*arguments, wanted=status)
        self._screen.ran("sockhop " + " ".join(arguments), _shortened(text))
        return text


def _url(target: tuple[str, int]) -> str:
    return f"http://{target[0]}:{target[1]}/health"


def _shortened(text: str) -> str:
    lines = text.splitlines()
    if len(lines) > _HEAD + _TAIL + 1:
        lines[_HEAD:-_TAIL] = ["..."]
    return "\n".join(lines)


def _demand(what: str, text: str) -> None:
    if what not in text:
        raise SockhopError(f"the output lacks what was to be seen: {what}", hint=text)
