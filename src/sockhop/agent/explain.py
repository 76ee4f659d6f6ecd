"""Why a socket is connected to what it is connected to."""

import socket
import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import msgspec

from sockhop.agent.denied import Denied, DeniedLately
from sockhop.agent.events import Event, EventLog
from sockhop.agent.find_socket import FoundSocket, cookie_of, find_socket
from sockhop.agent.installed import read_services
from sockhop.agent.reasons import Case, reasons_against, socket_cgroup
from sockhop.agent.state import PolicyState
from sockhop.agent.target import split_service_port
from sockhop.datapath.balancer import BalanceMaps
from sockhop.datapath.memory import Peer, SocketMemory
from sockhop.datapath.records import (
    REASONS,
    STATES,
    FrontendKey,
    Layer,
    Provenance,
    Setting,
    word_generation,
)
from sockhop.datapath.sockets import TCP_STATES, Sockets
from sockhop.kernel.procfs import boot_time, borrowed
from sockhop.kernel.syscall import KernelError
from sockhop.model import Protocol, endpoint, parse_address, unpack_address

__all__ = ["DatagramRow", "Explanation", "History", "Origin", "explain", "history"]

_PROTOCOLS = {protocol.number: protocol for protocol in Protocol}


class Origin(msgspec.Struct):
    """How a connected socket came to its backend.

    `backend_state`: gone, where it is not installed any more. `since`: RFC 3339, `age`: seconds.
    `generation_now`: of the frontend; 0 where it is not installed any more.
    """

    service: str
    port_name: str
    frontend: str
    backend: str
    backend_id: int
    backend_state: str
    rule: str
    since: str
    age: float
    generation: int
    generation_now: int


class DatagramRow(msgspec.Struct):
    """The backend that an unconnected UDP socket uses for a frontend. `latest`: it sent last."""

    service: str
    port_name: str
    frontend: str
    backend: str
    backend_id: int
    backend_state: str
    latest: bool


class Explanation(msgspec.Struct):
    """All that is known of a socket. `remote` is the real peer, "" without one.

    `peer_name` is what getpeername() gives, "" without a peer; `reasons` say why it is not
    balanced; `origin` is also there if the socket has left that backend since. `denied`: what a
    policy denied it last, or of one that listens, somebody who dialled it. `inode` is 0 where
    no program has the socket open.
    """

    protocol: str
    state: str
    local: str
    remote: str
    peer_name: str
    balanced: bool
    origin: Origin | None
    datagrams: list[DatagramRow]
    denied: Denied | None
    reasons: list[str]
    processes: list[str]
    cookie: int
    inode: int
    netns: int
    cgroup: str


class History(msgspec.Struct):
    """What was done to a socket that may be gone by now."""

    cookie: int
    events: list[Event]


def history(text: str, log: EventLog) -> History | None:
    """Return what was done to the socket whose cookie *text* is; None without anything."""
    cookie = cookie_of(text)
    events = log.of_socket(cookie) if cookie else []
    return History(cookie, events) if cookie and events else None


def explain(
    text: str, pins: Path, cgroup: Path, policies: Sequence[PolicyState] = ()
) -> Explanation:
    """Explain the socket that *text* names, see :func:`find_socket`, which raises the errors.

    *cgroup* is where the hooks are if they have no links; *policies*: what a running agent says of
    them. NotInstalled without maps.
    """
    with (
        BalanceMaps(pins) as maps,
        SocketMemory(pins) as memory,
        DeniedLately(pins, policies) as lately,
    ):
        found = find_socket(text, pins)
        known = _recall(found, memory, pins)
        names = _Names(maps)
        origin = known.provenance
        current = origin is not None and _is_current(origin, found)
        balanced = current or (bool(known.peers) and not found.socket.remote_port)
        case = Case(maps, pins, cgroup, found, origin, known.peer_name is not None)
        remote = _remote(found)
        peer_name = known.peer_name
        if peer_name is None:  # what the hooks would make of it
            translated = current and not maps.setting(Setting.BYPASS)
            peer_name = _frontend_end(origin) if origin and translated else remote
        group = socket_cgroup(found)
        denied = lately.of(found.socket.cookie)
        reasons = [] if balanced else list(reasons_against(case))
        # Of one that is connected by now it says nothing any more.
        if denied and not balanced and not found.socket.remote_port:
            reasons.insert(0, denied.reason)
        return Explanation(
            protocol=_PROTOCOLS[found.socket.protocol],
            state=TCP_STATES[found.socket.state - 1],
            local=_end(found.socket.local_address, found.socket.local_port),
            remote=remote,
            peer_name=peer_name,
            balanced=balanced,
            origin=names.origin(origin) if origin else None,
            datagrams=names.datagrams(known.peers),
            denied=denied,
            reasons=reasons,
            processes=[f"{holder} fd {holder.fd}" for holder in found.holders],
            cookie=found.socket.cookie,
            inode=found.socket.inode,
            netns=found.netns,
            cgroup=str(group or ""),
        )


class _Known(NamedTuple):
    """What is remembered of a socket; `peer_name`: None where it could not be asked."""

    provenance: Provenance | None
    peers: list[Peer]
    peer_name: str | None


def _recall(found: FoundSocket, memory: SocketMemory, pins: Path) -> _Known:
    cookie = found.socket.cookie
    for holder in found.holders:
        with suppress(KernelError), borrowed(holder) as own:
            origin = memory.provenance(own) or memory.provenance_by_cookie(cookie)
            return _Known(origin, memory.peers(own, cookie), _peer_name(own))
    # Nobody has it open, or we may not look: the iterator sees what a connect has left.
    with Sockets(pins) as programs:
        seen = (each for each in programs.remembered() if each.cookie == cookie)
        origin = next((each.origin for each in seen), None)
    return _Known(origin or memory.provenance_by_cookie(cookie), [], None)


def _peer_name(own: socket.socket) -> str:
    """What getpeername() gives, through the hooks: they follow the socket, not who asks."""
    try:
        address, port, *_ = own.getpeername()
    except OSError:
        return ""
    return endpoint(parse_address(address), port)


def _is_current(origin: Provenance, found: FoundSocket) -> bool:
    there = (origin.backend_address, origin.backend_port)
    return (found.socket.remote_address, found.socket.remote_port) == there


def _remote(found: FoundSocket) -> str:
    address, port = found.socket.remote_address, found.socket.remote_port
    return _end(address, port) if port else ""


def _frontend_end(origin: Provenance) -> str:
    return _end(origin.frontend_address, origin.frontend_port)


def _end(address: bytes, port: int) -> str:
    return endpoint(unpack_address(address), port)


class _Names:
    """Turns ids and addresses into what people know."""

    def __init__(self, maps: BalanceMaps) -> None:
        self._maps = maps
        self._services = read_services(maps)

    def origin(self, origin: Provenance) -> Origin:
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - origin.since / 1e9
        since = datetime.fromtimestamp(boot_time() + origin.since / 1e9, UTC)
        return Origin(
            *split_service_port(self._services.get(origin.service, "")),
            frontend=f"{_frontend_end(origin)}/{_PROTOCOLS[origin.protocol].lower()}",
            backend=_end(origin.backend_address, origin.backend_port),
            backend_id=origin.backend,
            backend_state=self._backend_state(origin.backend),
            rule=REASONS[origin.reason],
            since=since.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            age=age,
            generation=origin.generation,
            generation_now=self._generation(origin),
        )

    def datagrams(self, peers: list[Peer]) -> list[DatagramRow]:
        latest = max((peer.used for peer in peers), default=0)
        return [
            DatagramRow(
                *split_service_port(self._service_of(peer.backend)),
                frontend=f"{_end(peer.frontend_address, peer.frontend_port)}/udp",
                backend=_end(peer.backend_address, peer.backend_port),
                backend_id=peer.backend,
                backend_state=self._backend_state(peer.backend),
                latest=0 < latest == peer.used,
            )
            for peer in sorted(peers, key=lambda peer: -peer.used)
        ]

    def _backend_state(self, number: int) -> str:
        record = self._maps.backends.get(number)
        return "gone" if record is None else STATES[record.state]

    def _generation(self, origin: Provenance) -> int:
        for layer in Layer:
            end = origin.frontend_address, 0, origin.frontend_port, origin.protocol, layer
            found = self._maps.find_frontend(FrontendKey(*end), origin.netns)
            if found and found[1].id == origin.frontend:
                return word_generation(self._maps.words.get(origin.frontend) or 0)
        return 0

    def _service_of(self, backend: int) -> str:
        record = self._maps.backends.get(backend)
        return self._services.get(record.service, "") if record else ""
