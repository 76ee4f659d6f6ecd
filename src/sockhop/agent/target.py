"""From services to the entries that the hooks will find: what should be installed."""

from collections.abc import Iterable
from typing import NamedTuple

from sockhop.datapath.records import FrontendFlag, FrontendKey
from sockhop.model import (
    Algorithm,
    Backend,
    BackendState,
    Desired,
    Frontend,
    FrontendType,
    Protocol,
    Service,
    is_loopback,
    pack_address,
)

__all__ = ["Entry", "Member", "Target", "expand", "serving", "split_service_port"]


class Member(NamedTuple):
    """A backend as one of a service port, whatever its weight and state."""

    service: str
    address: str
    port: int
    protocol: Protocol


class Entry(NamedTuple):
    """What the hooks should find at one frontend key; `backends` are those that serve.

    `service` is the service port, `namespace/name:port` as kube-proxy writes it; `affinity` in
    seconds.
    """

    service: str
    type: FrontendType
    flags: FrontendFlag
    affinity: int
    algorithm: Algorithm
    backends: tuple[Backend, ...]

    @property
    def label(self) -> tuple[str, FrontendType, FrontendFlag, int]:
        """All that stands in the frontend's own map entry."""
        return self[:4]

    @property
    def choice(self) -> tuple[Algorithm, tuple[Backend, ...]]:
        """All that a generation holds."""
        return self[4:]


class Target(NamedTuple):
    """All that should be installed."""

    entries: dict[FrontendKey, Entry]
    members: dict[Member, Backend]


def serving(backends: Iterable[Backend], fallback: Iterable[BackendState]) -> tuple[Backend, ...]:
    """Return the backends that new connections may go to.

    Those that are active and have a weight; where there are none, those of the first state of
    *fallback* that has any (terminating by default, KEP-1669: it is better than nothing).
    """
    usable = [backend for backend in backends if backend.weight]
    for state in (BackendState.ACTIVE, *fallback):
        if found := tuple(backend for backend in usable if backend.state is state):
            return found
    return ()


def expand(desired: Desired, home: int) -> Target:
    """Return what to install for *desired*.

    Loopback is local: a loopback frontend or backend holds only in the network namespace
    with the cookie *home*.
    """
    entries: dict[FrontendKey, Entry] = {}
    members: dict[Member, Backend] = {}
    for service, frontend in desired.frontends():
        name = _service_port(service, frontend)
        for backend in frontend.backends:
            members[Member(name, backend.address, backend.port, frontend.protocol)] = backend
        entries.update(_entries(service, frontend, home))
    return Target(entries, members)


def split_service_port(name: str) -> tuple[str, str]:
    """Return a service port's service and port name, "" where the port has none."""
    service, _, port_name = name.partition(":")
    return service, port_name


def _service_port(service: Service, frontend: Frontend) -> str:
    return f"{service.name}:{frontend.port_name}" if frontend.port_name else service.name


def _entries(
    service: Service, frontend: Frontend, home: int
) -> Iterable[tuple[FrontendKey, Entry]]:
    def entry(backends: Iterable[Backend], flags: FrontendFlag) -> Entry:
        return Entry(
            _service_port(service, frontend),
            frontend.type,
            flags | (FrontendFlag.RESERVED if service.reserve else FrontendFlag(0)),
            service.affinity_seconds,
            service.algorithm,
            serving(backends, service.fallback),
        )

    everywhere = FrontendKey(
        pack_address(frontend.address), 0, frontend.port, frontend.protocol.number
    )
    at_home = everywhere._replace(netns=home)
    whole = entry(frontend.backends, FrontendFlag(0))
    if is_loopback(frontend.address):
        nowhere_else = entry((), FrontendFlag.SCOPED | FrontendFlag.ABSENT)
        return ((at_home, whole), (everywhere, nowhere_else))
    remote = [backend for backend in frontend.backends if not is_loopback(backend.address)]
    if len(remote) == len(frontend.backends):
        return ((everywhere, whole),)
    return ((at_home, whole), (everywhere, entry(remote, FrontendFlag.SCOPED)))
