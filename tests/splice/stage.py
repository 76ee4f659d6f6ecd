"""Two network namespaces joined by a veth, and a cgroup whose sockets are spliced, or not."""

import contextlib
import socket
import subprocess
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Any

from sockhop.datapath.balancer import remove_pins
from sockhop.datapath.splice_records import (
    LaneMode,
    OwnerKind,
    SpliceCounters,
    SpliceMode,
    SpliceOwner,
    SplicePolicy,
    SpliceReason,
    SpliceSetting,
    reason_counts,
)
from sockhop.datapath.splicer import SplicedSocket, Splicer, Sweeper, no_counters, stop_splicing
from sockhop.kernel import netns
from sockhop.kernel.cgroups import open_cgroup
from sockhop.kernel.netns import current_cookie
from sockhop.model import SpliceLimits
from tests.sandbox import Sandbox

__all__ = ["Place", "Stage", "cookie"]


class Place(Enum):
    """Where a connection is: its address and whether the client is in the other namespace."""

    LOOPBACK4 = ("127.0.0.1", "127.0.0.1", False)
    LOOPBACK6 = ("::1", "::1", False)
    VETH4 = ("10.77.0.1", "10.77.0.2", True)
    VETH6 = ("fd77::1", "fd77::2", True)
    MAPPED = ("10.77.0.1", "::ffff:10.77.0.2", True)

    def __init__(self, server: str, client: str, crosses: bool) -> None:
        self.server = server
        self.client = client
        self.crosses = crosses

    @property
    def target(self) -> str:
        """What the client dials."""
        return f"::ffff:{self.server}" if "::ffff" in self.client else self.server

    @staticmethod
    def family(address: str) -> socket.AddressFamily:
        return socket.AF_INET6 if ":" in address else socket.AF_INET


class Stage:
    """Use as a context manager; the body is inside. Without *spliced* all is plain TCP."""

    def __init__(
        self, *, spliced: bool = True, path: Path | None = None, mode: SpliceMode = SpliceMode.ON
    ) -> None:
        self.sandbox = Sandbox()
        limits = SpliceLimits()
        self.policy = SplicePolicy(0, limits.budget, limits.leave_after, mode, 0)
        self._spliced = spliced
        self._path = path
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> "Stage":
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.sandbox)
            self.other = Path(f"{self.sandbox.netns}-far")
            self._join(stack)
            if self._spliced:
                self._attach(stack)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _join(self, stack: contextlib.ExitStack) -> None:
        near, far = self.sandbox.name, self.other.name
        run = [
            f"ip netns add {far}",
            f"ip -n {far} link set lo up",
            f"ip -n {near} link add near type veth peer name far netns {far}",
            f"ip -n {near} addr add {Place.VETH4.server}/24 dev near",
            f"ip -n {far} addr add {Place.VETH4.client}/24 dev far",
            f"ip -n {near} addr add {Place.VETH6.server}/64 dev near nodad",
            f"ip -n {far} addr add {Place.VETH6.client}/64 dev far nodad",
            f"ip -n {near} link set near up",
            f"ip -n {far} link set far up",
        ]
        for number, line in enumerate(run):
            subprocess.run(line.split(), check=True)
            if not number:
                stack.callback(subprocess.run, ["ip", "netns", "del", far], check=False)
        for where in (self.sandbox.netns, self.other):
            with netns.entered(where):
                # For tests that use a tuple again.
                Path("/proc/sys/net/ipv4/tcp_tw_reuse").write_text("1")
                Path("/proc/sys/net/ipv4/tcp_fastopen").write_text("3")

    def _attach(self, stack: contextlib.ExitStack) -> None:
        pins = self.sandbox.pins
        pins.mkdir(mode=0o700)
        stack.callback(remove_pins, pins)
        self.splicer = stack.enter_context(Splicer(pins, path=self._path))
        self.sweeper = stack.enter_context(Sweeper(pins))
        stack.callback(stop_splicing, pins)
        self.maps = self.splicer.maps
        self.maps.counters.set(0, no_counters())
        for where in (self.sandbox.netns, self.other):
            with netns.entered(where):
                self.maps.owners.set(SpliceOwner(current_cookie(), OwnerKind.NETNS), self.policy)
        with open_cgroup(self.sandbox.cgroup) as cgroup:
            self.splicer.attach(cgroup)

    # --- sockets ------------------------------------------------------------------------------

    def listen(self, place: Place, port: int = 0, **options: Any) -> socket.socket:
        """Return a listener at the place's server address."""
        with netns.entered(self.sandbox.netns):
            made = socket.socket(Place.family(place.server))
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        for option, value in options.items():
            made.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
        made.bind((place.server, port))
        made.listen(128)
        return made

    def client(self, place: Place, port: int = 0) -> socket.socket:
        """Return a socket of the client's namespace, bound to *port*."""
        with netns.entered(self.other if place.crosses else self.sandbox.netns):
            made = socket.socket(Place.family(place.client))
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind((place.client, port))
        return made

    def connected(self, place: Place) -> tuple[socket.socket, socket.socket]:
        """Return both ends of a new connection: the client's, the server's."""
        with self.listen(place) as listener:
            client = self.client(place)
            client.connect((place.target, listener.getsockname()[1]))
            return client, listener.accept()[0]

    # --- what the kernel says -----------------------------------------------------------------

    def counters(self) -> SpliceCounters:
        """Return the counters of what was opted in without a service."""
        found = self.maps.counters.get(0)
        assert found is not None
        return found  # type: ignore[no-any-return]

    def reasons(self) -> dict[SpliceReason, int]:
        """Return how often each reason came up, those that did."""
        return {reason: n for reason, n in reason_counts(self.counters()).items() if n}

    def entries(self) -> dict[int, SplicedSocket]:
        """Return the sockets in the sockhash by their cookies."""
        return {each.socket.cookie: each for each in self.sweeper.sockets()}

    def lane(self, of: socket.socket) -> LaneMode | None:
        """Return the mode of the direction in which *of* sends; None if it is in no sockhash."""
        found = self.entries().get(cookie(of))
        return None if found is None else LaneMode(found.lane.mode)

    def detach(self) -> None:
        """Take the program that pairs sockets off the cgroup."""
        stop_splicing(self.sandbox.pins)
        self.maps.set(SpliceSetting.OFF, 0)

    @contextlib.contextmanager
    def switched_off(self) -> Iterator[None]:
        """Run the body with splicing off."""
        self.maps.set(SpliceSetting.OFF, 1)
        try:
            yield
        finally:
            self.maps.set(SpliceSetting.OFF, 0)


def cookie(of: socket.socket) -> int:
    """Return a socket's cookie (SO_COOKIE)."""
    return int.from_bytes(of.getsockopt(socket.SOL_SOCKET, 57, 8), "little")
