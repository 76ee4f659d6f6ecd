"""From a change of a manifest to the last socket ended, with an agent between them."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from sockhop.agent.client import ask_agent
from sockhop.bench.holder import COMMAND, Await, Close, Group, Holder, Open, Prepare
from sockhop.bench.rooms import Room, Site
from sockhop.datapath.balancer import remove_pins
from sockhop.errors import SockhopError

__all__ = ["measure_change"]

_OURSELVES = (sys.executable, "-P", "-c", "from sockhop.cli.main import main; main()")
_FRONTEND, _PORT, _BACKENDS = "10.255.0.1", 7000, ("10.1.0.1", "10.1.0.2")
_STARTING = 60.0
_ENDS = {"removed": "sever"}


def measure_change(site: Site, sockets: int, rounds: int) -> list[float]:
    """Return the milliseconds from the rename of a manifest to the last of *sockets* ended.

    Half of them TCP; their one backend is replaced by another.
    """
    with site.room("change") as room, ExitStack() as stack:
        room.run("ip", "addr", "add", "10.0.0.1/8", "dev", "lo")
        holder = Holder(room.start(*COMMAND, stdin=subprocess.PIPE, stdout=subprocess.PIPE))
        stack.callback(holder.end)
        here = str(room.netns)
        holder.ask(Prepare([here], _PORT))
        manifest = site.directory / "change.json"
        _write(manifest, 0)
        stack.enter_context(_agent(site, room, manifest))
        found = []
        for number in range(1, rounds + 2):
            holder.ask(Open("all", [Group(here, sockets, _FRONTEND, 80)]))
            aside = site.directory / "change.new"
            _write(aside, number % 2)
            time.sleep(0.5)  # the agent is at rest again
            found.append(holder.ask(Await("all", str(aside), str(manifest))) * 1e3)
            holder.ask(Close("all"))
        return found[1:]  # the first warms up


def _write(path: Path, which: int) -> None:
    # Other services keep the change from being one of more than half of all backends.
    others = [f"10.2.0.{n}:{_PORT}" for n in range(1, 11)]
    web = {
        "name": "web",
        "frontends": [f"{_FRONTEND}:80/tcp+udp"],
        "backends": [f"{_BACKENDS[which]}:{_PORT}"],
        "intent": {"tcp": _ENDS, "udp": _ENDS},
    }
    rest = {"name": "rest", "frontends": ["10.255.0.2:80/tcp"], "backends": others}
    path.write_text(json.dumps({"version": 1, "services": [web, rest]}))


@contextmanager
def _agent(site: Site, room: Room, manifest: Path) -> Iterator[None]:
    api, log = site.directory / "api.sock", site.directory / "agent.log"
    options = ["--cgroup", room.cgroup, "--bpffs", site.pins, "--api", api]
    command = [*_OURSELVES, *map(str, options), "agent", "--brake", "off", "-f", str(manifest)]
    with ExitStack() as stack, log.open("wb") as output:
        stack.callback(remove_pins, site.pins)
        agent = room.start(*command, stdout=output, stderr=output)
        stack.callback(agent.wait)
        stack.callback(agent.terminate)
        end = time.monotonic() + _STARTING
        while ask_agent(api) is None:
            if agent.poll() is not None or time.monotonic() > end:
                raise SockhopError("the agent does not start", hint=log.read_text()[-500:])
            time.sleep(0.01)
        yield
