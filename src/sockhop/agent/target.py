"""From services to the entries that the hooks will find: what should be installed."""

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import NamedTuple

from sockhop.datapath.records import Client, FrontendFlag, FrontendKey, Layer
from sockhop.model import (
    Algorithm,
    Backend,
    BackendState,
    Clients,
    Desired,
    Frontend,
    FrontendType,
    Protocol,
    Service,
    is_loopback,
    pack_address,
)

__all__ = [
    "Cgroups",
    "Entry",
    "Member",
    "Target",
    "expand",
    "is_redirect",
    "service_port",
    "serving",
    "split_service_port",
    "with_redirects",
]

_REDIRECT = "@redirect"
"""Ends the name of a service that stands for a redirect; no other name has an @."""


_NOWHERE: Mapping[str, int] = MappingProxyType({})
_PROTOCOL_NUMBERS = {protocol: protocol.number for protocol in Protocol}


Cgroups = tuple[tuple[int, Client], ...]


class Member(NamedTuple):
    """A backend as one of a service port, whatever its weight and state."""

    service: str
    address: str
    port: int
    protocol: Protocol


class Entry(NamedTuple):
    """What the hooks should find at one frontend key; `backends` are those that serve.

    `service` is the service port, `namespace/name:port` as kube-proxy writes it; `affinity` in
    seconds; `cgroups` says by cgroup id who is served, see :class:`Client`.
    """

    service: str
    cgroups: Cgroups
    type: FrontendType
    flags: FrontendFlag
    affinity: int
    algorithm: Algorithm
    backends: tuple[Backend, ...]

    @property
    def label(self) -> tuple[FrontendType, FrontendFlag, int]:
        """All that can change in the frontend's own map entry."""
        return self[2:5]

    @property
    def identity(self) -> tuple[str, Cgroups]:
        """What makes it another entry, with another id."""
        return self[:2]

    @property
    def choice(self) -> tuple[Algorithm, tuple[Backend, ...]]:
        """All that a generation holds."""
        return self[5:]


class Target(NamedTuple):
    """All that should be installed."""

    entries: dict[FrontendKey, Entry]
    members: dict[Member, Backend]


class _Namespaces(NamedTuple):
    home: int
    places: Mapping[str, int]


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


def expand(desired: Desired, home: int, places: Mapping[str, int] = _NOWHERE) -> Target:
    """Return what to install for *desired*.

    *home* is the cookie of the network namespace where loopback is local; *places* has the cookies
    of the namespaces and the ids of the cgroups that services name by path.
    """
    namespaces = _Namespaces(home, places)
    entries: dict[FrontendKey, Entry] = {}
    members: dict[Member, Backend] = {}
    for service, frontend in desired.frontends():
        name = service_port(service, frontend)
        for backend in frontend.backends:
            members[Member(name, backend.address, backend.port, frontend.protocol)] = backend
        entries.update(_entries(service, frontend, namespaces))
    return Target(entries, members)


def with_redirects(desired: Desired, places: Mapping[str, int] | None = None) -> Desired:
    """Return *desired* with a service in the place of each redirect that is not refused.

    With *places*, see expand(), only of those whose exempt cgroups are there: where nobody runs yet
    there is nowhere to redirect to, and whoever begins to run must be exempt at once.
    """
    services = tuple(
        Service(
            f"{redirect.name}{_REDIRECT}",
            redirect.frontends,
            clients=Clients(exclude=redirect.exempt) if redirect.exempt else None,
        )
        for redirect in desired.redirects
        if not redirect.refused
        and (places is None or all(path in places for path in redirect.exempt))
    )
    return Desired((*desired.services, *services), desired.policies)


def is_redirect(name: str) -> bool:
    """Whether a service port, by its name, stands for a redirect."""
    return split_service_port(name)[0].endswith(_REDIRECT)


def split_service_port(name: str) -> tuple[str, str]:
    """Return a service port's service and port name, "" where the port has none."""
    service, _, port_name = name.partition(":")
    return service, port_name


def service_port(service: Service, frontend: Frontend) -> str:
    """Return the name under which a frontend is installed."""
    return f"{service.name}:{frontend.port_name}" if frontend.port_name else service.name


def _entries(
    service: Service, frontend: Frontend, namespaces: _Namespaces
) -> Iterable[tuple[FrontendKey, Entry]]:
    cgroups = _cgroups(service, namespaces.places)
    if service.clients and service.clients.cgroups:
        always = FrontendFlag.CLIENTS | FrontendFlag.LISTED_ONLY
    else:
        always = FrontendFlag.CLIENTS if cgroups else FrontendFlag(0)
    if service.reserve:
        always |= FrontendFlag.RESERVED

    def entry(backends: Iterable[Backend], flags: FrontendFlag) -> Entry:
        return Entry(
            service_port(service, frontend),
            cgroups,
            frontend.type,
            flags | always,
            service.affinity_seconds,
            service.algorithm,
            serving(backends, service.fallback),
        )

    redirects = frontend.type is FrontendType.LOCAL_REDIRECT
    everywhere = FrontendKey(
        pack_address(frontend.address),
        0,
        frontend.port,
        _PROTOCOL_NUMBERS[frontend.protocol],
        Layer.REDIRECTS if redirects else Layer.SERVICES,
    )
    where = _where(service, frontend, namespaces)
    remote = [backend for backend in frontend.backends if not is_loopback(backend.address)]
    local = len(remote) < len(frontend.backends)
    if where is None and not local:
        return ((everywhere, entry(frontend.backends, FrontendFlag(0))),)
    # The entry for everywhere sends readers on to that of their own namespace.
    if where is None:
        # A redirect to loopback is none elsewhere: what it hides goes on there.
        absent = FrontendFlag.ABSENT if redirects and not remote else FrontendFlag(0)
        rest, where = entry(remote, FrontendFlag.SCOPED | absent), [namespaces.home]
    else:
        rest = entry((), FrontendFlag.SCOPED | FrontendFlag.ABSENT)
    return (
        *(
            (
                everywhere._replace(netns=cookie),
                entry(frontend.backends if cookie == namespaces.home else remote, FrontendFlag(0)),
            )
            for cookie in where
        ),
        (everywhere, rest),
    )


def _cgroups(service: Service, places: Mapping[str, int]) -> Cgroups:
    if service.clients is None:
        return ()
    said = dict.fromkeys(service.clients.cgroups, Client.SERVED)
    said |= dict.fromkeys(service.clients.exclude, Client.EXCLUDED)
    return tuple(sorted((places[path], client) for path, client in said.items() if path in places))


def _where(service: Service, frontend: Frontend, namespaces: _Namespaces) -> list[int] | None:
    """Return the cookies of the namespaces where a frontend holds; None for everywhere."""
    chosen = service.clients.namespaces if service.clients else None
    if chosen == "all" or (chosen is None and not is_loopback(frontend.address)):
        return None
    if chosen in (None, "host"):
        return [namespaces.home]
    found = (namespaces.places.get(path) for path in chosen)
    return sorted({cookie for cookie in found if cookie is not None})
