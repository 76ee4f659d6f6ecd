"""What is installed and live, as rows for people and programs. Works without an agent."""

import os
import time
from collections import defaultdict
from pathlib import Path

import msgspec

from sockhop.agent.installed import read_installed
from sockhop.agent.target import split_service_port
from sockhop.datapath.balancer import BalanceMaps
from sockhop.datapath.records import REASONS
from sockhop.datapath.sockets import BalancedSocket, Sockets
from sockhop.model import Frontend, Protocol, endpoint, unpack_address

__all__ = [
    "BackendRow",
    "ServiceRow",
    "SocketRow",
    "list_backends",
    "list_services",
    "list_sockets",
]

_PROTOCOLS = {protocol.number: protocol for protocol in Protocol}


class ServiceRow(msgspec.Struct):
    """A frontend of a service. `netns`: cookie of the one namespace where it holds, else 0."""

    service: str
    port_name: str
    frontend: str
    type: str
    algorithm: str
    affinity_seconds: int
    backends: int
    connects: int
    no_backend: int
    netns: int
    generation: int
    id: int


class BackendRow(msgspec.Struct):
    """A backend of a service. `live`: sockets that may still be open to it, never too few."""

    service: str
    port_name: str
    backend: str
    protocol: str
    state: str
    weight: int
    live: int
    id: int


class SocketRow(msgspec.Struct):
    """A balanced socket. `age` in seconds since the connect; `processes` as command/pid."""

    protocol: str
    state: str
    local: str
    frontend: str
    backend: str
    service: str
    reason: str
    age: float
    processes: list[str]
    cookie: int
    netns: int
    generation: int
    backend_id: int


def list_services(maps: BalanceMaps) -> list[ServiceRow]:
    """Return the frontends that are installed, by service."""
    rows = []
    for key, old in read_installed(maps).entries.items():
        counters = maps.counters.get(old.id)
        frontend = Frontend(unpack_address(key.address), key.port, _PROTOCOLS[key.protocol])
        rows.append(
            ServiceRow(
                *split_service_port(old.entry.service),
                frontend=str(frontend),
                type=old.entry.type,
                algorithm=old.entry.algorithm,
                affinity_seconds=old.entry.affinity,
                backends=len(old.entry.backends),
                connects=counters.connects if counters else 0,
                no_backend=counters.no_backend if counters else 0,
                netns=key.netns,
                generation=old.generation,
                id=old.id,
            )
        )
    return sorted(rows, key=lambda row: (row.service, row.frontend, row.netns))


def list_backends(maps: BalanceMaps) -> list[BackendRow]:
    """Return the backends of all services, with their live sockets."""
    live: defaultdict[int, int] = defaultdict(int)
    for key, count in maps.live.items():
        live[key.backend] += count
    rows = [
        BackendRow(
            *split_service_port(member.service),
            backend=str(old.backend),
            protocol=member.protocol,
            state=old.backend.state,
            weight=old.backend.weight,
            live=live[old.id],
            id=old.id,
        )
        for member, old in read_installed(maps).members.items()
    ]
    return sorted(rows, key=lambda row: (row.service, row.backend, row.protocol))


def list_sockets(maps: BalanceMaps, pins: Path) -> list[SocketRow]:
    """Return the balanced sockets of all network namespaces, the youngest last."""
    with Sockets(pins) as programs:
        sockets = programs.balanced()
    names = {number: name for name, number in read_installed(maps).services.items()}
    owners = _owners({found.socket.inode for found in sockets} - {0})
    rows = [_socket_row(found, names, owners) for found in sockets]
    return sorted(rows, key=lambda row: -row.age)


def _socket_row(
    found: BalancedSocket, services: dict[int, str], owners: dict[int, list[str]]
) -> SocketRow:
    origin, socket = found
    return SocketRow(
        protocol=_PROTOCOLS[origin.protocol],
        state=found.state,
        local=endpoint(unpack_address(socket.local_address), socket.local_port),
        frontend=endpoint(unpack_address(origin.frontend_address), origin.frontend_port),
        backend=endpoint(unpack_address(origin.backend_address), origin.backend_port),
        service=split_service_port(services.get(origin.service, ""))[0],
        reason=REASONS[origin.reason],
        age=(time.clock_gettime_ns(time.CLOCK_BOOTTIME) - origin.since) / 1e9,
        processes=owners.get(socket.inode, []),
        cookie=socket.cookie,
        netns=socket.netns_inode,
        generation=origin.generation,
        backend_id=origin.backend,
    )


def _owners(inodes: set[int]) -> dict[int, list[str]]:
    """Find who holds each socket inode, as `command/pid` (proc_pid_fd(5))."""
    found: defaultdict[int, list[str]] = defaultdict(list)
    for process in Path("/proc").iterdir() if inodes else ():
        if not process.name.isdecimal():
            continue
        try:
            held = {os.readlink(entry.path) for entry in os.scandir(process / "fd")}
            command = (process / "comm").read_text().strip()
        except OSError:
            continue
        for target in held:
            if target.startswith("socket:[") and int(target[8:-1]) in inodes:
                found[int(target[8:-1])].append(f"{command}/{process.name}")
    return found
