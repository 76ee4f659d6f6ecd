"""What stands between a client and a server: nothing, sockhop, nftables, haproxy."""

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sockhop.agent.installer import Installer
from sockhop.agent.plan import make_plan
from sockhop.agent.target import expand
from sockhop.bench.messages import Listen, Loop, Operation, Places
from sockhop.bench.rooms import Room
from sockhop.bench.services import (
    BACKENDS,
    CLIENT_ADDRESS,
    FRONTEND_PORT,
    SERVER_ADDRESS,
    SERVICE_NETWORK,
    ServicePort,
    desired,
    haproxy_configuration,
    nftables_transactions,
)
from sockhop.datapath.balancer import Balancer, remove_pins
from sockhop.errors import SockhopError
from sockhop.kernel.bpffs import lock_directory
from sockhop.kernel.cgroups import open_cgroup
from sockhop.model import Protocol

__all__ = [
    "SERVERS",
    "LeftOut",
    "balance_with_haproxy",
    "balance_with_nftables",
    "balance_with_sockhop",
    "conntrack_entries",
    "furnish",
    "version",
]

SERVERS = "servers"
"""The places of a room's own servers, for a loop."""
LOADING_MAX = 60.0
"""Seconds that nftables may take to load its rules, and haproxy to start."""
HAPROXY_MAX = 10_000
"""With more services haproxy is left out: a listener each, and 20,000 files are a usual limit."""

_PACKAGES = {"nft": "nftables", "haproxy": "haproxy"}
_CONNTRACK = "net/netfilter/nf_conntrack_"
_SHORT_TIMEOUTS = ("tcp_timeout_close", "tcp_timeout_time_wait", "udp_timeout",
                   "udp_timeout_stream")  # fmt: skip


class LeftOut(Exception):
    """A peer is not measured; the text says why."""


def furnish(room: Room) -> None:
    """Give a room its addresses and start the servers."""
    for address in (f"{SERVER_ADDRESS}/16", f"{CLIENT_ADDRESS}/32"):
        room.run("ip", "addr", "add", address, "dev", "lo")
    room.server.ask(Listen(list(BACKENDS)))
    room.client.ask(Places(SERVERS, list(BACKENDS)))


@contextmanager
def balance_with_sockhop(room: Room, pins: Path, ports: list[ServicePort]) -> Iterator[None]:
    """Install services in maps below *pins* and attach the hooks to the room's cgroup."""
    with lock_directory(pins), open_cgroup(room.cgroup) as cgroup:
        try:
            with Balancer(pins) as balancer:
                installer = Installer(balancer.maps)
                installer.apply(make_plan(expand(desired(ports), 0), installer.installed))
                balancer.attach(cgroup)
            yield
        finally:
            remove_pins(pins)


def balance_with_nftables(room: Room, ports: list[ServicePort]) -> None:
    """Load rules into the room; LeftOut where that cannot be done."""
    _require("nft")
    # Where a cluster's node has a default route.
    room.run(*("ip", "route", "add", SERVICE_NETWORK, "dev", "lo", "src", CLIENT_ADDRESS))
    end = time.monotonic() + LOADING_MAX
    try:
        for transaction in nftables_transactions(ports):
            room.run("nft", "-f", "-", text=transaction, seconds=max(0, end - time.monotonic()))
        # The table of connections is as large as it is; nothing shall pile up in it.
        for name in _SHORT_TIMEOUTS:
            room.set_sysctl(_CONNTRACK + name, "1")
    except TimeoutError:
        raise LeftOut(f"did not load its rules within {LOADING_MAX:g} s") from None
    except SockhopError as error:
        raise LeftOut(f"{error.message}: {error.hint.splitlines()[0]}") from None


def conntrack_entries(room: Room) -> int:
    """Return how many connections the kernel tracks in the room."""
    return int(room.run("cat", f"/proc/sys/{_CONNTRACK}count"))


def balance_with_haproxy(room: Room, ports: list[ServicePort], file: Path) -> None:
    """Start haproxy in the room, configured by *file*; LeftOut where that cannot be done."""
    if len(ports) > HAPROXY_MAX:
        raise LeftOut(f"not measured with more than {HAPROXY_MAX:,} services")
    _require("haproxy")
    room.run("ip", "addr", "add", SERVICE_NETWORK, "dev", "lo")  # all of it is local then
    file.write_text(haproxy_configuration(ports))
    log = file.with_suffix(".log")
    with log.open("wb") as output:
        process = room.start("haproxy", "-db", "-f", str(file), stdout=output, stderr=output)
    os.sched_setaffinity(process.pid, {room.cpus.server})
    last = [port for port in ports if port.protocol is Protocol.TCP][-1]
    room.client.ask(Places("last", [(last.address, FRONTEND_PORT)]))
    end = time.monotonic() + LOADING_MAX
    while True:
        try:
            room.client.ask(Loop(Operation.ASK, Protocol.TCP, "last", 1))
            return
        except SockhopError:
            if process.poll() is not None or time.monotonic() > end:
                said = log.read_text(errors="replace").strip().splitlines() or ["nothing"]
                raise LeftOut(f"did not start; it said: {said[0]}") from None
            time.sleep(0.05)


def version(tool: str) -> str:
    """Return what `nft` or `haproxy` calls itself; LeftOut where it is not on PATH."""
    _require(tool)
    flag = "--version" if tool == "nft" else "-v"
    done = subprocess.run([tool, flag], check=False, capture_output=True, text=True)
    return done.stdout.partition("\n")[0].strip()


def _require(tool: str) -> None:
    if not shutil.which(tool):
        raise LeftOut(f"not installed: apt-get install {_PACKAGES[tool]}")
