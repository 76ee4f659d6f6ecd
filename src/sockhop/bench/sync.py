"""`sockhop bench sync`: from manifests to the kernel answering with them."""

import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

from sockhop.bench.manifests import NETWORKS, Change, FormName, Manifests
from sockhop.bench.messages import Stages, Watch
from sockhop.bench.report import Form, Machine, SyncReport
from sockhop.bench.rooms import Room, Site
from sockhop.bench.services import FRONTEND_PORT
from sockhop.datapath.balancer import remove_pins
from sockhop.errors import SockhopError

__all__ = ["SyncPlan", "measure_sync"]

_OURSELVES = (sys.executable, "-P", "-c", "from sockhop.cli.main import main; main()")
_STARTING_MAX = 120.0
_CHANGE_MAX = 30.0
_CHANGES_MAX = 60.0
"""Seconds after which no further change of the same form is made."""
_PAUSE = 0.0002
"""Seconds between two looks at the kernel."""


class SyncPlan(NamedTuple):
    """What to measure; `starts` and `changes`: how often each form is."""

    services: int
    backends: int
    starts: int
    changes: int
    forms: Sequence[FormName] = tuple(FormName)


def measure_sync(
    site: Site, plan: SyncPlan, command: list[str], say: Callable[[str], None]
) -> SyncReport:
    """Measure as *plan* says, in a room of *site*; *say* hears how it goes."""
    with site.room("agent") as room:
        for network in NETWORKS:
            room.run("ip", "addr", "add", f"{network}.0.1/16", "dev", "lo")
        return SyncReport(
            benchmark="sync",
            command=command,
            machine=Machine.here(),
            services=plan.services,
            backends=plan.services * plan.backends,
            forms=[_measure(site, room, plan, form, say) for form in plan.forms],
        )


def _measure(
    site: Site, room: Room, plan: SyncPlan, form: FormName, say: Callable[[str], None]
) -> Form:
    say(f"{form}: writing {plan.services:,} services")
    directory = site.directory / form.name.lower()
    directory.mkdir()
    manifests = Manifests(directory, form, plan.services, plan.backends)
    say(f"{form}: measuring the stages")
    stages = room.server.ask(Stages(str(manifests.path), str(site.pins))).stages
    cold = []
    for _ in range(plan.starts - 1):
        say(f"{form}: starting the agent")
        with _agent(site, room, manifests) as (pid, seconds):
            cold.append(round(seconds, 3))
    say(f"{form}: starting the agent, then changing a service")
    with _agent(site, room, manifests) as (pid, seconds):
        cold.append(round(seconds, 3))
        changes = _change(room, manifests, plan.changes)
        peak, maps = _peak_memory(pid), _maps_memory(pid)
    return Form(
        form=form,
        files=manifests.files,
        bytes=manifests.bytes,
        cold_seconds=cold,
        change_milliseconds=changes,
        peak_memory_mib=round(peak, 1),
        maps_mib=round(maps, 1),
        stages={step: round(seconds, 3) for step, seconds in stages.items()},
    )


@contextmanager
def _agent(site: Site, room: Room, manifests: Manifests) -> Iterator[tuple[int, float]]:
    """Run an agent; give its pid, and how many seconds it took to the last service's answer."""
    log = site.directory / "agent.log"
    options = {"--cgroup": room.cgroup, "--bpffs": site.pins, "--api": site.directory / "api.sock"}
    arguments = [str(part) for option in options.items() for part in option]
    watch = _watch(manifests, 0, 1.0)
    with ExitStack() as stack, log.open("wb") as output:
        stack.callback(remove_pins, site.pins)
        room.client.send(watch)
        begin = time.monotonic()
        agent = room.start(
            *_OURSELVES, *arguments, "agent", "-f", str(manifests.path),
            stdout=output, stderr=output,
        )  # fmt: skip
        stack.callback(_stop, agent)
        while not (answered := room.client.receive().value):
            if agent.poll() is not None or time.monotonic() - begin > _STARTING_MAX:
                raise SockhopError("the agent does not answer", hint=log.read_text()[-500:])
            room.client.send(watch)
        yield agent.pid, answered - begin


def _stop(agent: subprocess.Popen[bytes]) -> None:
    agent.terminate()
    try:
        agent.wait(20)
    except subprocess.TimeoutExpired:
        agent.kill()
        agent.wait(20)


def _watch(
    manifests: Manifests, network: int, seconds: float, change: Change | None = None
) -> Watch:
    return Watch(
        manifests.watched,
        FRONTEND_PORT,
        f"{NETWORKS[network]}.0.1",
        seconds,
        _PAUSE,
        (str(change.source), str(change.target)) if change else None,
    )


def _change(room: Room, manifests: Manifests, changes: int) -> list[float]:
    """Move the last service to and fro; return the milliseconds until the kernel knew."""
    found: list[float] = []
    end = time.monotonic() + _CHANGES_MAX
    while len(found) < changes and time.monotonic() < end:
        network = (len(found) + 1) % 2
        change = manifests.change(network)
        time.sleep(0.3)  # the agent is at rest again
        taken = room.client.ask(_watch(manifests, network, _CHANGE_MAX, change)).value
        if not taken:
            raise SockhopError(f"a change was not in the kernel after {_CHANGE_MAX:g} s")
        found.append(round(1000 * taken, 2))
    return found


def _peak_memory(pid: int) -> float:
    """Return the most memory that a process has ever held, MiB (VmHWM, proc_pid_status(5))."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == "VmHWM":
            return int(value.split()[0]) / 1024
    raise SockhopError(f"process {pid} has ended")


def _maps_memory(pid: int) -> float:
    """Return the memory of the BPF maps that a process has open, MiB (its fdinfo)."""
    maps: dict[str, int] = {}
    for file in Path(f"/proc/{pid}/fdinfo").iterdir():
        try:
            lines = file.read_text().splitlines()
        except FileNotFoundError:  # closed meanwhile; maps stay open
            continue
        fields = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
        if "map_id" in fields:
            maps[fields["map_id"]] = int(fields["memlock"])
    return sum(maps.values()) / 2**20
