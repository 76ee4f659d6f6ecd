"""Mixed load while the agent restarts and splicing is turned off and on: no error, no growth."""

import contextlib
import json
import os
import random
import re
import socket
import subprocess
import threading
import time
from pathlib import Path
from typing import NamedTuple

import pytest

from sockhop.datapath.balancer import map_directory
from sockhop.datapath.splicer import Sweeper
from tests.sandbox import Agent, Sandbox, compact, publish, wait_until

pytestmark = pytest.mark.kernel

SECONDS = float(os.environ.get("SOCKHOP_SOAK", "4"))
FRONTEND = ("10.96.0.1", 80)


def echo(listener: socket.socket) -> None:
    def serve(one: socket.socket) -> None:
        with one, contextlib.suppress(OSError):
            while data := one.recv(65536):
                one.sendall(data)

    with contextlib.suppress(OSError):
        while True:
            threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()


class Load:
    """Connections that come, exchange random messages, and go in different ways."""

    def __init__(self, seed: int) -> None:
        self.choose = random.Random(seed)
        self.errors: list[str] = []
        self.exchanges = 0
        self.stopping = False
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _run(self) -> None:
        while not self.stopping:
            try:
                self._connection()
            except OSError as error:
                self.errors.append(repr(error))

    def _connection(self) -> None:
        try:
            client = socket.create_connection(FRONTEND, 10)
        except ConnectionRefusedError:  # bypass is on: nobody translates the address
            return
        with client:
            client.settimeout(20)
            for _ in range(self.choose.randrange(1, 40)):
                size = int(2 ** self.choose.uniform(0, 17))
                data = self.choose.randbytes(size)
                sender = threading.Thread(target=client.sendall, args=(data,))
                sender.start()
                got = bytearray()
                while len(got) < size and (more := client.recv(size - len(got))):
                    got += more
                sender.join()
                if got != data:
                    self.errors.append(f"{len(got)} of {size} bytes, or others")
                self.exchanges += 1
            if self.choose.random() < 0.3:
                client.shutdown(socket.SHUT_WR)
                client.recv(1)


class Held(NamedTuple):
    """What is held: bytes by the kernel for the splice maps, TCP sockets, bytes by the agent."""

    maps: int
    sockets: int
    resident: int


def held(sandbox: Sandbox, agent: Agent) -> Held:
    def number(pattern: str, text: str) -> int:
        found = re.search(pattern, text, re.MULTILINE)
        assert found, text
        return int(found[1])

    maps = 0
    for path in map_directory(sandbox.pins).glob("splice_*"):
        said = subprocess.run(
            ["bpftool", "-j", "map", "show", "pinned", path],
            check=True, capture_output=True, text=True,
        ).stdout  # fmt: skip
        maps += json.loads(said)["bytes_memlock"]
    sockets = number(r"^TCP: inuse (\d+)", sandbox.run("cat", "/proc/net/sockstat").stdout)
    status = Path(f"/proc/{agent.process.pid}/status").read_text()
    return Held(maps, sockets, number(r"^VmRSS:\s+(\d+) kB", status) << 10)


def used(pins: Path, name: str) -> int:
    """Return how many entries a pinned map has."""
    said = subprocess.run(
        ["bpftool", "-j", "map", "dump", "pinned", map_directory(pins) / name],
        check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    return len(json.loads(said))


def test_nothing_grows(sandbox: Sandbox) -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=128) as listener:
        threading.Thread(target=echo, args=(listener,), daemon=True).start()
        fields = {
            "frontends": [f"{FRONTEND[0]}:{FRONTEND[1]}"],
            "backends": [f"127.0.0.1:{listener.getsockname()[1]}"],
        }
        manifest = sandbox.manifest(compact(web=fields | {"splice": "on"}))
        agent = sandbox.start_agent("-f", str(manifest)).wait_ready()
        before = held(sandbox, agent)
        loads = [Load(seed) for seed in range(4)]
        choose, end = random.Random(1), time.monotonic() + SECONDS
        try:
            while time.monotonic() < end:
                time.sleep(choose.uniform(0.2, 1))
                match choose.choice(("kill", "off", "auto", "bypass")):
                    case "kill":
                        agent.stop(choose.choice((9, 15)))
                        agent = sandbox.start_agent("-f", str(manifest)).wait_ready()
                    case "bypass":
                        sandbox.sockhop("bypass", "on")
                        sandbox.sockhop("bypass", "off")
                    case mode:
                        publish(manifest, compact(web=fields | {"splice": mode}))
                        time.sleep(0.3)
                        publish(manifest, compact(web=fields | {"splice": "on"}))
        finally:
            for load in loads:
                load.stopping = True
            for load in loads:
                load.thread.join(60)
        assert not [error for load in loads for error in load.errors]
        assert sum(load.exchanges for load in loads) > 10 * SECONDS
        with Sweeper(sandbox.pins) as sweeper:
            wait_until(lambda: not sweeper.sockets(), "an empty sockhash")
        wait_until(lambda: used(sandbox.pins, "splice_pairs") <= 4, "no pairs but lost ones")
        # What closes last is still on its way: TIME_WAIT is not counted, FIN_WAIT is.
        wait_until(lambda: held(sandbox, agent).sockets <= before.sockets, "no sockets")
        after = held(sandbox, agent)
        assert after.maps <= before.maps + (1 << 20)
        assert after.resident <= before.resident + (32 << 20)
        agent.stop()
