"""`sockhop bench splice`: splicing beside plain TCP, a sockmap by tuple and Unix sockets."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

from sockhop.bench.messages import Dial, Listen, Loop, Operation, Pin, Places, Talk, TalkServer
from sockhop.bench.programs import Load, missing, prepare, run_load, serve
from sockhop.bench.report import Machine, SpliceReport, SpliceResult, Spread, spread_of
from sockhop.bench.rooms import Room, Site, Worker
from sockhop.datapath.splice_records import (
    OwnerKind,
    SpliceMode,
    SpliceOwner,
    SplicePolicy,
)
from sockhop.datapath.splicer import Splicer, Sweeper, no_counters, stop_splicing
from sockhop.datapath.vanilla import vanilla
from sockhop.kernel import netns
from sockhop.kernel.cgroups import open_cgroup
from sockhop.model import Protocol, SpliceLimits

__all__ = ["PLAIN", "SplicePlan", "measure_splice"]

PLAIN, AGAIN, SPLICED, VANILLA, UNIX = (
    *("plain TCP", "plain TCP, again", "sockhop", "sockmap by tuple"),
    "Unix socket",
)
LEFT = "sockhop, left"
"""A stream whose sockets have left the sockhash."""
_LOOPBACK, _VETH = "127.0.0.1", "10.78.0.1"
_PORT, _FAR_PORT, _SETUP_PORT = 7000, 7001, 7002
_EXCHANGE_BYTES, _STREAM_BYTES = 1 << 26, 1 << 27
_MOST_EXCHANGES, _SETUPS = 4000, 500
_SETTLED = 1.1
"""Seconds until a sweep takes out what the one before has marked."""


class SplicePlan(NamedTuple):
    """What to measure, `rounds` times: messages there and back and streams of a size, programs."""

    rounds: int
    exchanges: Sequence[int]
    streams: Sequence[int]
    loads: Sequence[Load] = ()


class _Stand(NamedTuple):
    """A peer of sockhop: whose client dials where."""

    peer: str
    client: Worker
    where: str
    port: int
    room: Room


_Kind = tuple[str, str, str, int, str]
"""What: exchange, stream, setup or the name of a load; place; CPUs; size; peer."""
_Samples = dict[_Kind, list[tuple[float, float]]]
"""Nanoseconds of wall clock, and of CPU time on both sides, for a message or a connection."""


def measure_splice(
    site: Site, plan: SplicePlan, command: list[str], say: Callable[[str], None]
) -> SpliceReport:
    """Measure as *plan* says, in rooms of *site*; *say* hears how it goes."""
    samples: _Samples = defaultdict(list)
    with ExitStack() as stack:
        say("setting up")
        rooms = {peer: stack.enter_context(_room(site, peer)) for peer in (PLAIN, AGAIN)}
        other = rooms[VANILLA] = stack.enter_context(_room(site, VANILLA))
        stack.enter_context(vanilla(other.cgroup))
        ours = rooms[SPLICED] = stack.enter_context(_room(site, SPLICED))
        far = {peer: _far_client(room) for peer, room in rooms.items()}
        sweeper = stack.enter_context(_spliced(site, ours, far[SPLICED]))
        unix = _unix(site, rooms[PLAIN])
        loads, left_out = _furnish(site, plan.loads, rooms)
        loopback = [_Stand(p, r.client, _LOOPBACK, _PORT, r) for p, r in rooms.items()]
        veth = [_Stand(p, far[p], _VETH, _FAR_PORT, r) for p, r in rooms.items()]
        for number in range(plan.rounds + 1):
            say(f"round {number} of {plan.rounds}" if number else "warming up")
            kept: _Samples = samples if number else defaultdict(list)
            back = not number % 2
            for place, stands in (("loopback", [*loopback, unix]), ("veth", veth)):
                order = stands[:: -1 if back else 1]
                _exchange(kept, place, order, plan.exchanges)
                _stream(kept, place, order, plan.streams, sweeper)
            _set_up(kept, loopback[:: -1 if back else 1])
            _load(kept, loads, list(rooms.items())[:: -1 if back else 1])
    return SpliceReport(
        benchmark="splice",
        command=command,
        machine=Machine.here(),
        rounds=plan.rounds,
        left_out=left_out,
        results=[_result(samples, kind) for kind in samples],
    )


# --- who is measured ----------------------------------------------------------------------------


@contextmanager
def _room(site: Site, peer: str) -> Iterator[Room]:
    with site.room(peer.replace(", ", "-").replace(" ", "-")) as room:
        for port in (_PORT, _FAR_PORT):  # each serves one connection at a time
            room.server.ask(TalkServer("0.0.0.0", port))
        room.server.ask(Listen([(_LOOPBACK, _SETUP_PORT)]))
        room.client.ask(Places("server", [(_LOOPBACK, _SETUP_PORT)]))
        yield room


def _far_client(room: Room) -> Worker:
    """Return a client in another namespace, behind a veth."""
    client = room.far_client()
    there = f"/proc/{client.pid}/ns/net"
    for line in (
        f"ip link add near type veth peer name far netns {client.pid}",
        f"ip addr add {_VETH}/24 dev near",
        "ip link set near up",
        f"nsenter --net={there} ip addr add 10.78.0.2/24 dev far",
        f"nsenter --net={there} ip link set far up",
    ):
        room.run(*line.split())
    return client


def _unix(site: Site, room: Room) -> _Stand:
    path = str(site.directory / "talk.sock")
    room.server.ask(TalkServer(path, 0))
    return _Stand(UNIX, room.client, path, 0, room)


@contextmanager
def _spliced(site: Site, room: Room, far: Worker) -> Iterator[Sweeper]:
    """Splice the room's sockets and those of its far client."""
    limits = SpliceLimits()
    policy = SplicePolicy(0, limits.budget, limits.leave_after, SpliceMode.ON, 0)
    site.pins.mkdir(mode=0o700, exist_ok=True)
    with Splicer(site.pins) as splicer, Sweeper(site.pins) as sweeper:
        splicer.maps.counters.set(0, no_counters())
        for pid in (room.server.pid, far.pid):
            with netns.entered(Path(f"/proc/{pid}/ns/net")):
                owner = SpliceOwner(netns.current_cookie(), OwnerKind.NETNS)
            splicer.maps.owners.set(owner, policy)
        with open_cgroup(room.cgroup) as cgroup:
            splicer.attach(cgroup)
        try:
            yield sweeper
        finally:
            stop_splicing(site.pins)


def _furnish(
    site: Site, loads: Sequence[Load], rooms: Mapping[str, Room]
) -> tuple[list[Load], dict[str, str]]:
    """Start the programs' servers; return the loads that can be run, and why the others cannot."""
    servers = dict.fromkeys(load.server for load in loads)
    left_out = {server: why for server in servers if (why := missing(server))}
    for server in servers.keys() - left_out.keys():
        prepare(server, site.directory)
        for room in rooms.values():
            serve(server, room, site.directory)
    return [load for load in loads if load.server not in left_out], left_out


# --- measuring ----------------------------------------------------------------------------------


def _exchange(
    samples: _Samples, place: str, stands: Sequence[_Stand], sizes: Sequence[int]
) -> None:
    for cpus in ("one CPU", "two CPUs"):
        for size in sizes:
            count = min(_MOST_EXCHANGES, _EXCHANGE_BYTES // size)
            for stand in stands:
                cpu = stand.room.cpus
                stand.client.ask(Pin(cpu.server if cpus == "one CPU" else cpu.client))
                stand.client.ask(Dial(stand.where, stand.port))
                stand.client.ask(Talk(False, size, min(100, count)))
                taken = stand.client.ask(Talk(False, size, count)).stages
                kind = "exchange", place, cpus, size, stand.peer
                samples[kind].append(_each(taken, count))


def _stream(
    samples: _Samples,
    place: str,
    stands: Sequence[_Stand],
    sizes: Sequence[int],
    sweeper: Sweeper,
) -> None:
    for size in sizes:
        count = _STREAM_BYTES // max(size, 4096)
        for stand in stands:
            stand.client.ask(Pin(stand.room.cpus.client))
            stand.client.ask(Dial(stand.where, stand.port))
            taken = stand.client.ask(Talk(True, size, count)).stages
            kind = "stream", place, "two CPUs", size, stand.peer
            samples[kind].append(_each(taken, count))
            if stand.peer == SPLICED:
                sweeper.sweep()
                time.sleep(_SETTLED)
                sweeper.sweep()
                taken = stand.client.ask(Talk(True, size, count)).stages
                samples["stream", place, "two CPUs", size, LEFT].append(_each(taken, count))


def _set_up(samples: _Samples, stands: Sequence[_Stand]) -> None:
    for stand in stands:
        stand.client.ask(Pin(stand.room.cpus.client))
        taken = stand.client.ask(Loop(Operation.CONNECT, Protocol.TCP, "server", _SETUPS)).value
        kind = "setup", "loopback", "two CPUs", 0, stand.peer
        samples[kind].append((taken / _SETUPS, taken / _SETUPS))


def _load(samples: _Samples, loads: Sequence[Load], rooms: Sequence[tuple[str, Room]]) -> None:
    for load in loads:
        for peer, room in rooms:
            kind = load.name, "loopback", "two CPUs", 0, peer
            samples[kind].append(run_load(load, room))


def _each(taken: dict[str, float], count: int) -> tuple[float, float]:
    return taken["wall"] / count, (taken["client_cpu"] + taken["server_cpu"]) / count


def _result(samples: _Samples, kind: _Kind) -> SpliceResult:
    what, place, cpus, size, peer = kind
    own = samples[kind]
    base = samples[what, place, cpus, size, PLAIN]

    def ratio(which: int) -> Spread:
        return spread_of([b[which] / o[which] for b, o in zip(base, own, strict=True)])

    return SpliceResult(
        what=what,
        place=place,
        cpus=cpus,
        size=size,
        peer=peer,
        nanoseconds=spread_of([wall for wall, _ in own]),
        cpu_nanoseconds=spread_of([cpu for _, cpu in own]),
        speed_to_plain=ratio(0),
        per_cpu_to_plain=ratio(1),
        samples=[list(each) for each in own],
    )
