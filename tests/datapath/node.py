"""The balance datapath without an agent: programs, maps and services, all in the test's process.

The process that makes a :class:`Node` is inside its sandbox, and its sockets are balanced.
"""

import contextlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sockhop.agent.installer import Installer
from sockhop.agent.plan import make_plan
from sockhop.agent.target import expand, with_redirects
from sockhop.datapath.balancer import Balancer, map_directory
from sockhop.datapath.records import Counters, FrontendKey, Provenance, Setting, Total
from sockhop.datapath.sockets import Sockets
from sockhop.kernel.btf import Layouts
from sockhop.kernel.cgroups import open_cgroup
from sockhop.kernel.maps import Map, open_pinned
from sockhop.kernel.maps import _integer as integer
from sockhop.kernel.netns import current_cookie
from sockhop.kernel.objects import object_path
from sockhop.model import (
    Backend,
    Desired,
    Frontend,
    Protocol,
    Redirect,
    Service,
    pack_address,
    unpack_address,
)
from tests.mutants import mutant
from tests.sandbox import Sandbox

__all__ = ["ADDRESSES", "Node", "backend", "service"]

ADDRESSES = ("10.96.0.1/32", "10.96.1.0/24", "fd00:96::1/128")
"""What the sandbox's loopback device has beside 127.0.0.0/8 and ::1."""


def _split(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    return host.strip("[]"), int(port)


def backend(text: str, **fields: Any) -> Backend:
    """Return the backend at `address:port`."""
    return Backend(*_split(text), **fields)


def service(name: str, *frontends: str, backends: Any = (), **fields: Any) -> Service:
    """Return a service; *frontends* as `address:port/protocol`, *backends* as text or Backend.

    A frontend gets those backends of its own family, an IPv6 one IPv4 ones if there are no others.
    """
    every = [backend(each) if isinstance(each, str) else each for each in backends]
    made = []
    for text in frontends:
        there, _, protocol = text.partition("/")
        host, port = _split(there)
        own = [each for each in every if (":" in each.address) == (":" in host)]
        if ":" in host:
            own = own or every
        made.append(Frontend(host, port, Protocol(protocol.upper()), backends=tuple(own)))
    return Service(name, tuple(made), **fields)


class Node:
    """A sandbox whose cgroup is balanced. Use as a context manager."""

    def __init__(self) -> None:
        self.sandbox = Sandbox(loopback=ADDRESSES)
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> "Node":
        with contextlib.ExitStack() as stack:
            sandbox = stack.enter_context(self.sandbox)
            sandbox.pins.mkdir(mode=0o700)
            self.home = current_cookie()
            self.balancer = stack.enter_context(Balancer(sandbox.pins))
            self.maps = self.balancer.maps
            self.installer = Installer(self.maps)
            self._cgroup = stack.enter_context(open_cgroup(sandbox.cgroup))
            self.balancer.attach(self._cgroup)
            # A user looks up sk_storage by a socket's descriptor (net/core/bpf_sk_storage.c).
            self._origins = stack.enter_context(
                Map(
                    open_pinned(map_directory(sandbox.pins) / "provenance"),
                    integer("i"),
                    Layouts(object_path("balance")).codec(Provenance, "provenance"),
                )
            )
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def install(
        self,
        *services: Service,
        redirects: Sequence[Redirect] = (),
        places: Mapping[str, int] | None = None,
    ) -> int:
        """Make *services* all that there is; return the generation.

        *places*: what they name by path, cookies and ids.
        """
        desired = with_redirects(Desired(services, (), tuple(redirects)))
        target = expand(desired, self.home, places or {})
        plan = make_plan(target, self.installer.installed)
        return self.installer.apply(plan)

    def read_again(self) -> None:
        """Load the programs and read the maps as an agent does that starts again."""
        again = self._stack.enter_context(Balancer(self.sandbox.pins))
        self.installer = Installer(again.maps)
        again.attach(self._cgroup)

    @contextlib.contextmanager
    def mutated(self, directory: Path, *changes: tuple[str, str]) -> Iterator[None]:
        """Run the body with programs that lack something: see tests.mutants."""
        directory.mkdir(exist_ok=True)
        with self.running(mutant(directory, "balance", *changes)):
            yield

    @contextlib.contextmanager
    def running(self, path: Path) -> Iterator[None]:
        """Run the body with the programs of the object file at *path*."""
        with Balancer(self.sandbox.pins, path=path) as other:
            other.attach(self._cgroup)
            try:
                yield
            finally:
                self.balancer.attach(self._cgroup)

    @contextlib.contextmanager
    def bypassed(self) -> Iterator[None]:
        """Run the body in bypass."""
        self.maps.settings.set(Setting.BYPASS, 1)
        try:
            yield
        finally:
            self.maps.settings.set(Setting.BYPASS, 0)

    def settle(self) -> None:
        """Do what the agent does every 30 s."""
        with Sockets(self.sandbox.pins) as sockets:
            sockets.settle()

    # --- what the maps hold -------------------------------------------------------------------

    def provenance(self, fd: int) -> Provenance | None:
        """Return what the kernel remembers of this process' socket *fd*."""
        return self._origins.get(fd)

    def chosen(self, fd: int) -> tuple[str, int]:
        """Return the backend of the socket *fd*."""
        found = self._origins.get(fd)
        assert found is not None, "this socket is not balanced"
        return unpack_address(found.backend_address), found.backend_port

    def total(self, which: Total) -> int:
        """Return how often something has happened."""
        return self.maps.totals.get(which) or 0

    def counters(self, frontend: str) -> Counters:
        """Return the counters of the frontend `address:port/protocol`, that of home first."""
        there, _, protocol = frontend.partition("/")
        host, port = _split(there)
        key = FrontendKey(pack_address(host), self.home, port, Protocol(protocol.upper()).number)
        found = self.maps.frontends.get(key) or self.maps.frontends.get(key._replace(netns=0))
        assert found is not None, f"no frontend {frontend}"
        counters: Counters | None = self.maps.counters.get(found.id)
        assert counters is not None
        return counters

    def live(self) -> Counter[tuple[str, int]]:
        """Return the live counts by backend, of all services and namespaces together."""
        where = {
            number: (unpack_address(record.address), record.port)
            for number, record in self.maps.backends.items()
        }
        found: Counter[tuple[str, int]] = Counter()
        for key, count in self.maps.live.items():
            if count:
                found[where.get(key.backend, ("gone", key.backend))] += count
        return found
