"""From services to the entries that the hooks will find: what should be installed."""

from collections.abc import Iterable
from typing import NamedTuple

from sockhop.datapath.records import FrontendFlag, FrontendKey
from sockhop.model import (
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

__all__ = ["Entry", "Member", "Target", "expand", "serving"]


class Member(NamedTuple):
    """A backend as one of a service, whatever its weight and state."""

    service: str
    address: str
    port: int
    protocol: Protocol


class Entry(NamedTuple):
    """What the hooks should find at one frontend key; `backends` are those that serve."""

    service: str
    type: FrontendType
    flags: FrontendFlag
    backends: tuple[Backend, ...]


class Target(NamedTuple):
    """All that should be installed."""

    entries: dict[FrontendKey, Entry]
    members: dict[Member, Backend]


def serving(backends: Iterable[Backend]) -> tuple[Backend, ...]:
    """Return the backends that new connections may go to.

    Those that are active and have a weight; where there are none, terminating ones
    (KEP-1669: a connection to a backend that is going beats none).
    """
    usable = [backend for backend in backends if backend.weight]
    for state in (BackendState.ACTIVE, BackendState.TERMINATING):
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
        for backend in frontend.backends:
            member = Member(service.name, backend.address, backend.port, frontend.protocol)
            members[member] = backend
        entries.update(_entries(service, frontend, home))
    return Target(entries, members)


def _entries(
    service: Service, frontend: Frontend, home: int
) -> Iterable[tuple[FrontendKey, Entry]]:
    everywhere = FrontendKey(
        pack_address(frontend.address), 0, frontend.port, frontend.protocol.number
    )
    at_home = everywhere._replace(netns=home)
    whole = Entry(service.name, frontend.type, FrontendFlag(0), serving(frontend.backends))
    if is_loopback(frontend.address):
        scoped = FrontendFlag.SCOPED | FrontendFlag.ABSENT
        return ((at_home, whole), (everywhere, whole._replace(flags=scoped, backends=())))
    remote = [backend for backend in frontend.backends if not is_loopback(backend.address)]
    if len(remote) == len(frontend.backends):
        return ((everywhere, whole),)
    elsewhere = whole._replace(flags=FrontendFlag.SCOPED, backends=serving(remote))
    return ((at_home, whole), (everywhere, elsewhere))
