"""What an agent would do, in rows for people and programs. Nothing is written."""

from collections.abc import Iterator, Mapping

import msgspec

from sockhop.agent.capacity import MapNeed, Usage, map_needs
from sockhop.agent.impact import Impact
from sockhop.agent.plan import Installed, Plan, scope_of
from sockhop.agent.policy_preview import PolicyChange
from sockhop.agent.target import Member, split_service_port
from sockhop.kernel.netns import current_cookie
from sockhop.model import Backend, Frontend, Protocol, endpoint, unpack_address

__all__ = ["BackendChange", "FrontendChange", "Preview", "preview"]

_ACTIONS = {"+": "add", "~": "change", "-": "remove"}
_PROTOCOLS = {protocol.number: protocol for protocol in Protocol}


class FrontendChange(msgspec.Struct):
    """What clients of a frontend would meet. `action`: add, change, remove."""

    action: str
    service: str
    port_name: str
    frontend: str
    scope: str
    netns_cookie: int
    backends: list[str]
    detail: str


class BackendChange(msgspec.Struct):
    """A backend that comes, goes, or has another state or weight; `serves`: also in a frontend."""

    action: str
    service: str
    port_name: str
    backend: str
    protocol: str
    state: str
    weight: int
    serves: bool


class Preview(msgspec.Struct):
    """All that would change, what it needs of the maps, and which live sockets it concerns."""

    frontends: list[FrontendChange]
    backends: list[BackendChange]
    maps: list[MapNeed]
    sockets: Impact
    policies: list[PolicyChange] = []


def preview(plan: Plan, installed: Installed, sizes: Mapping[str, int], sockets: Impact) -> Preview:
    """Return what *plan*, made against *installed*, would change."""
    usage = Usage.of(old.entry for old in installed.entries.values())
    return Preview(
        list(_frontends(plan, installed)),
        list(_backends(plan, installed)),
        map_needs(plan, installed, usage, sizes),
        sockets,
    )


def _frontends(plan: Plan, installed: Installed) -> Iterator[FrontendChange]:
    own_cookie = current_cookie()
    for change in plan.changes(installed):
        key, entry = change.key, change.entry
        frontend = Frontend(unpack_address(key.address), key.port, _PROTOCOLS[key.protocol])
        yield FrontendChange(
            _ACTIONS[change.sign],
            *split_service_port(entry.service),
            frontend=str(frontend),
            scope=scope_of(key, entry.flags, own_cookie),
            netns_cookie=key.netns,
            backends=[] if change.sign == "-" else [str(backend) for backend in entry.backends],
            detail=change.detail,
        )


def _backends(plan: Plan, installed: Installed) -> Iterator[BackendChange]:
    serving = set(_serving(plan, installed))
    for member, backend in plan.members.items():
        action = "change" if member in installed.members else "add"
        yield _backend(action, member, backend, member in serving)
    for member in plan.gone:
        yield _backend("remove", member, installed.members[member].backend, member in serving)


def _serving(plan: Plan, installed: Installed) -> Iterator[Member]:
    """The backends of the frontends that change, as they are and as they will be."""
    for change in plan.changes(installed):
        old = installed.entries.get(change.key)
        for entry in (change.entry, *([old.entry] if old else [])):
            for backend in entry.backends:
                protocol = _PROTOCOLS[change.key.protocol]
                yield Member(entry.service, backend.address, backend.port, protocol)


def _backend(action: str, member: Member, backend: Backend, serves: bool) -> BackendChange:
    return BackendChange(
        action,
        *split_service_port(member.service),
        backend=endpoint(member.address, member.port),
        protocol=member.protocol,
        state=backend.state,
        weight=backend.weight,
        serves=serves,
    )
