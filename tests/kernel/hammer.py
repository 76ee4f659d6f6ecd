"""Changes services as fast as it can while every core connects to them and checks each answer."""

import errno
import multiprocessing
import os
import random
import socket
import time
from collections.abc import Callable
from ctypes import c_bool
from pathlib import Path
from typing import NamedTuple

from sockhop.agent.installer import Installer
from sockhop.agent.plan import make_plan
from sockhop.agent.target import expand
from sockhop.datapath.balancer import Balancer, map_directory
from sockhop.datapath.records import Provenance
from sockhop.kernel.btf import Layouts
from sockhop.kernel.cgroups import open_cgroup
from sockhop.kernel.maps import Map, open_pinned
from sockhop.kernel.maps import _integer as integer
from sockhop.kernel.netns import current_cookie
from sockhop.kernel.objects import object_path
from sockhop.model import Backend, Desired, Frontend, Protocol, Service
from tests.sandbox import Sandbox

__all__ = ["SERVICES", "Result", "Write", "desired", "hammer"]

SERVICES = 512

Write = Callable[[Installer, int], None]
"""Makes the generation of the given parity the one in force."""


class Result(NamedTuple):
    flips: int
    connects: int
    misses: int
    wrong: int


def backends(service: int, parity: int) -> tuple[Backend, ...]:
    """What a service has in even or odd generations: who and how many tells which."""
    sizes = (1 + service % 3, 3 - service % 3)
    return tuple(
        Backend(f"127.0.{1 + parity}.{1 + i}", 10000 + service) for i in range(sizes[parity])
    )


def frontend(service: int, parity: int = 0) -> Frontend:
    address = f"10.9.{service >> 8}.{service & 255}"
    return Frontend(address, 53, Protocol.UDP, backends=backends(service, parity))


def desired(parity: int) -> Desired:
    return Desired(tuple(Service(f"s{i}", (frontend(i, parity),)) for i in range(SERVICES)))


def install(installer: Installer, parity: int) -> None:
    """The real thing."""
    installer.apply(make_plan(expand(desired(parity), current_cookie()), installer.installed))


def hammer(
    sandbox: Sandbox,
    *,
    flips: int,
    seconds: float,
    write: Write = install,
    path: Path | None = None,
) -> Result:
    """Flip all services to and fro until *flips* are done, a miss is met, or *seconds* are over."""
    sandbox.pins.mkdir(mode=0o700)
    with Balancer(sandbox.pins, path=path) as balancer, open_cgroup(sandbox.cgroup) as cgroup:
        installer = Installer(balancer.maps)
        install(installer, 0)
        write(installer, 0)
        balancer.attach(cgroup)
        context = multiprocessing.get_context("fork")
        stop, results = context.Value(c_bool, False), context.SimpleQueue()
        clients = [
            context.Process(target=_client, args=(sandbox.pins, core, stop, results))
            for core in sorted(os.sched_getaffinity(0))
        ]
        for client in clients:
            client.start()
        done, end = 0, time.monotonic() + seconds
        while done < flips and time.monotonic() < end and not stop.value:
            write(installer, (done // SERVICES + 1) % 2)
            done += SERVICES
        stop.value = True
        found = [results.get() for _ in clients]
        for client in clients:
            client.join(30)
    return Result(done, *(sum(column) for column in zip(*found, strict=True)))


def _client(pins: Path, core: int, stop, results) -> None:  # type: ignore[no-untyped-def]
    os.sched_setaffinity(0, {core})
    chance = random.Random(core)
    layouts = Layouts(object_path("balance"))
    fd = open_pinned(map_directory(pins) / "provenance")
    # A user looks up sk_storage by a socket's descriptor (net/core/bpf_sk_storage.c).
    origins = Map(fd, integer("i"), layouts.codec(Provenance, "provenance"))
    connects = misses = wrong = 0
    while not stop.value:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
            for _ in range(64):
                service = chance.randrange(SERVICES)
                connects += 1
                try:
                    client.connect((frontend(service).address, 53))
                except OSError as error:
                    assert error.errno == errno.EHOSTUNREACH, error
                    misses += 1
                    continue
                found = origins.get(client.fileno())
                assert found is not None
                allowed = [*backends(service, 0), *backends(service, 1)]
                got = Backend(socket.inet_ntoa(found.backend_address[12:]), found.backend_port)
                wrong += got not in allowed
            if misses or wrong:
                stop.value = True  # one is enough to fail a test, and all that a mutant has to show
    results.put((connects, misses, wrong))
