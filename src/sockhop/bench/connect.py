"""`sockhop bench connect`: what a connection costs, sockhop beside its peers."""

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import NamedTuple

from sockhop.bench.messages import Loop, Operation, Places
from sockhop.bench.peers import (
    SERVERS,
    LeftOut,
    balance_with_haproxy,
    balance_with_nftables,
    balance_with_sockhop,
    conntrack_entries,
    furnish,
    version,
)
from sockhop.bench.report import ConnectReport, Machine, Result, Run, Spread, spread_of
from sockhop.bench.rooms import Room, Site
from sockhop.bench.services import (
    BACKENDS,
    ServicePort,
    dialled,
    service_ports,
    services_name,
)
from sockhop.model import Protocol

__all__ = ["ConnectPlan", "DIRECT", "HAPROXY", "NFTABLES", "SOCKHOP", "measure_connects"]

DIRECT = "direct"
DIRECT_AGAIN = "direct, again"
NO_SERVICE = "sockhop, not a service"
SOCKHOP = "sockhop"
NFTABLES = "nftables"
HAPROXY = "haproxy"
_PEERS = (DIRECT, DIRECT_AGAIN, NO_SERVICE, SOCKHOP, NFTABLES, HAPROXY)

_CONNECTIONS = {
    (Operation.CONNECT, Protocol.TCP): 1000,
    (Operation.CONNECT, Protocol.UDP): 2000,
    (Operation.ASK, Protocol.TCP): 512,
    (Operation.ASK, Protocol.UDP): 1024,
}
"""How many make a sample: short enough for all peers to have the same weather."""


class ConnectPlan(NamedTuple):
    """What to measure; `dialled`: most services of each protocol that are dialled."""

    services: Sequence[int]
    rounds: int
    dialled: int
    seed: int


class _Contender(NamedTuple):
    """A peer in its room, what it is measured with, and whether it is dialled as a service.

    haproxy accepts a connection before it dials, so what it costs shows only where somebody asks.
    """

    peer: str
    room: Room
    by_service: bool = False
    kinds: tuple[tuple[Operation, Protocol], ...] = tuple(_CONNECTIONS)


class _LineUp(NamedTuple):
    """All peers that could be set up for some services, with how long that took in seconds."""

    contenders: list[_Contender]
    setup_seconds: dict[str, float]
    left_out: dict[str, str]


_Samples = dict[tuple[Operation, Protocol, str], list[float]]
"""Nanoseconds a connection, in the order of the rounds."""


def measure_connects(
    site: Site, plan: ConnectPlan, command: list[str], say: Callable[[str], None]
) -> ConnectReport:
    """Measure as *plan* says, in rooms of *site*; *say* hears how it goes."""
    versions = {}
    for tool in ("nft", "haproxy"):
        try:
            versions[tool] = version(tool)
        except LeftOut as reason:
            versions[tool] = str(reason)
    return ConnectReport(
        benchmark="connect",
        command=command,
        machine=Machine.here(),
        seed=plan.seed,
        rounds=plan.rounds,
        backends=len(BACKENDS),
        versions=versions,
        runs=[_measure(site, plan, services, say) for services in plan.services],
    )


def _measure(site: Site, plan: ConnectPlan, services: int, say: Callable[[str], None]) -> Run:
    ports = service_ports(services)
    places = [dialled(ports, protocol, plan.dialled, plan.seed) for protocol in Protocol]
    with ExitStack() as stack:
        say(f"{services:,} services: setting up")
        contenders, setup_seconds, left_out = _line_up(site, stack, ports, places)
        for peer, reason in left_out.items():
            say(f"{services:,} services: without {peer}: {reason}")
        say(f"{services:,} services: measuring")
        samples = _sample(contenders, plan.rounds)
        conntrack = {
            contender.peer: conntrack_entries(contender.room)
            for contender in contenders
            if contender.peer == NFTABLES
        }
    return Run(
        services=services,
        dialled=max(len(place.places) for place in places),
        setup_seconds=setup_seconds,
        left_out=left_out,
        conntrack_entries=conntrack,
        results=[
            _result(samples, *kind, peer)
            for kind in _CONNECTIONS
            for peer in _PEERS
            if (*kind, peer) in samples
        ],
    )


def _line_up(
    site: Site, stack: ExitStack, ports: list[ServicePort], places: list[Places]
) -> _LineUp:
    """Set every peer up in a room of its own, so that none pays for another's rules."""

    def new_room(peer: str) -> Room:
        room = stack.enter_context(site.room(peer.replace(", ", "-")))
        furnish(room)
        for place in places:
            room.client.ask(place)
        return room

    ways: dict[str, Callable[[Room], object]] = {
        NFTABLES: lambda room: balance_with_nftables(room, ports),
        HAPROXY: lambda room: balance_with_haproxy(room, ports, site.directory / "haproxy.cfg"),
        SOCKHOP: lambda room: stack.enter_context(balance_with_sockhop(room, site.pins, ports)),
    }
    line_up = _LineUp([_Contender(peer, new_room(peer)) for peer in (DIRECT, DIRECT_AGAIN)], {}, {})
    for peer, set_up in ways.items():
        room = new_room(peer)
        begin = time.monotonic()
        try:
            set_up(room)
        except LeftOut as reason:
            line_up.left_out[peer] = str(reason)
            room.close()
            continue
        line_up.setup_seconds[peer] = round(time.monotonic() - begin, 3)
        if peer == SOCKHOP:
            line_up.contenders.append(_Contender(NO_SERVICE, room))
        kinds = ((Operation.ASK, Protocol.TCP),) if peer == HAPROXY else tuple(_CONNECTIONS)
        line_up.contenders.append(_Contender(peer, room, by_service=True, kinds=kinds))
    return line_up


def _sample(contenders: list[_Contender], rounds: int) -> _Samples:
    samples: _Samples = defaultdict(list)
    for number in range(rounds + 1):
        # Now one is the first, now the other; now forwards, now backwards.
        start = number // 2 % len(contenders)
        order = (contenders[start:] + contenders[:start])[:: 1 if number % 2 else -1]
        for (operation, protocol), count in _CONNECTIONS.items():
            for peer, room, by_service, kinds in order:
                if (operation, protocol) not in kinds:
                    continue
                places = services_name(protocol) if by_service else SERVERS
                taken = room.client.ask(Loop(operation, protocol, places, count)).value
                if number:  # the first round only warms up
                    samples[operation, protocol, peer].append(taken / count)
    return samples


def _result(samples: _Samples, operation: Operation, protocol: Protocol, peer: str) -> Result:
    own = samples[operation, protocol, peer]

    def ratio_to(other: str) -> Spread:
        pairs = zip(own, samples[operation, protocol, other], strict=True)
        return spread_of([mine / others for mine, others in pairs])

    return Result(
        operation=operation,
        protocol=protocol,
        peer=peer,
        connections=_CONNECTIONS[operation, protocol],
        nanoseconds=spread_of(own),
        to_direct=ratio_to(DIRECT),
        to_sockhop=ratio_to(SOCKHOP),
        samples=[round(sample, 1) for sample in own],
    )
