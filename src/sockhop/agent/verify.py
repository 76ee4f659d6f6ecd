"""Compares what should be, what is installed, and what sockets do."""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Set
from pathlib import Path
from typing import NamedTuple

import msgspec

from sockhop.agent.installed import read_installed
from sockhop.agent.plan import Installed, make_plan
from sockhop.agent.policy_check import check_policies
from sockhop.agent.policy_table import PolicyTable
from sockhop.agent.soundness import (
    Finding,
    Records,
    check_records,
    frontend_text,
    orphans,
    read_records,
    steady_frontends,
)
from sockhop.agent.target import Entry, Member, Target
from sockhop.datapath.attachment import Owner
from sockhop.datapath.balancer import HOOKS, BalanceMaps, attached_hooks, map_directory
from sockhop.datapath.pins import NotInstalled
from sockhop.datapath.policies import PolicyMaps
from sockhop.datapath.records import COUNTED_LIVE, FrontendKey, LiveKey, Setting
from sockhop.datapath.sockets import Socket, Sockets
from sockhop.errors import InputError
from sockhop.kernel.cgroups import AttachType
from sockhop.model import Backend, Protocol, endpoint, unpack_address

__all__ = ["Finding", "Verdict", "verify"]

_PROTOCOLS = {protocol.number: protocol for protocol in Protocol}
_LOOKS = 3
_PAUSE = 0.2
"""Seconds between looks: what an agent is just writing is no difference."""


class Verdict(msgspec.Struct):
    """What was found. `notes`: what is no difference but worth knowing; `compared`: how many."""

    differences: list[Finding]
    notes: list[str]
    compared: dict[str, int]


def verify(
    pins: Path,
    cgroup: Path,
    wanted: Callable[[], Target] | None,
    policies: Callable[[], PolicyTable] | None = None,
) -> Verdict:
    """Compare what should be with what is installed, that with itself, and both with sockets.

    *cgroup* is where programs without a link are; *wanted* returns what should be, None where that
    is not known; *policies*, called after it, the policies. A difference, or a note, is one that is
    there at each of several looks. NotInstalled where nothing is installed.
    """
    with BalanceMaps(pins) as maps, Sockets(pins) as sockets:
        sides = _Sides(pins, cgroup, maps, sockets, wanted, policies)
        verdict = _look(sides)
        for _ in range(_LOOKS - 1):
            if not verdict.differences and not verdict.notes:
                break
            time.sleep(_PAUSE)
            before, verdict = verdict, _look(sides)
            seen, noted = set(before.differences), set(before.notes)
            verdict.differences = [found for found in verdict.differences if found in seen]
            verdict.notes = [note for note in verdict.notes if note in noted]
    return verdict


class _Sides(NamedTuple):
    """What is compared."""

    pins: Path
    cgroup: Path
    maps: BalanceMaps
    sockets: Sockets
    wanted: Callable[[], Target] | None
    policies: Callable[[], PolicyTable] | None


def _look(sides: _Sides) -> Verdict:
    maps = sides.maps
    records, live = read_records(maps), _read_live(maps, sides.sockets)
    desired = _read_desired(sides.wanted, maps)
    hooks = attached_hooks(sides.pins, sides.cgroup if sides.cgroup.is_dir() else None)
    steady = steady_frontends(maps, records)
    differences = [
        *(_compare(*desired, steady) if isinstance(desired, tuple) else desired),
        *(_check_policies(sides) if isinstance(desired, tuple) else ()),
        *check_records(maps, records, steady),
        *_check_hooks(hooks, Owner(map_directory(sides.pins))),
        *_check_live(live, records),
    ]
    notes = list(orphans(records))
    if maps.setting(Setting.BYPASS):
        notes.append("bypass is on: nothing is balanced")
    compared = {
        "frontends": len(records.frontends),
        "backends": len(records.backends),
        "hooks": len(hooks),
        "sockets": len(live.sockets),
    }
    return Verdict(differences, notes, compared)


def _check_policies(sides: _Sides) -> Iterator[Finding]:
    if sides.policies is None:
        return
    table = sides.policies()
    try:
        with PolicyMaps(sides.pins) as maps:
            yield from check_policies(table, maps)
    except NotInstalled:  # an older version has made the maps
        if table:
            yield Finding("desired", "policies", "in force", "no maps for them")


# --- desired and installed ------------------------------------------------------------------------


def _read_desired(
    wanted: Callable[[], Target] | None, maps: BalanceMaps
) -> tuple[Target, Installed] | list[Finding]:
    """Return what is to be compared, or why it cannot be."""
    if wanted is None:
        return []
    try:
        return wanted(), read_installed(maps)
    except InputError as error:
        return [Finding("desired", "the agent's sources", "manifests", error.message)]
    except (IndexError, KeyError, ValueError):
        return [Finding("desired", "all", "what can be compared", "codes that make no sense")]


def _compare(target: Target, installed: Installed, steady: Set[FrontendKey]) -> Iterator[Finding]:
    plan = make_plan(target, installed)
    for key, entry in target.entries.items():
        old = installed.entries.get(key)
        where = f"{entry.service} {frontend_text(key)}"
        if old is None:
            yield Finding("desired", where, _entry_text(entry), "nothing")
        elif old.entry != entry and old.entry.service and key in steady:
            # What has no service is damaged; the comparison with itself says how.
            yield Finding("desired", where, *_apart(entry, old.entry))
    for key, entry in plan.removed.items():
        where = f"{entry.service} {frontend_text(key)}"
        yield Finding("desired", where, "nothing", _entry_text(entry))
    for member, backend in plan.members.items():
        found = installed.members.get(member)
        said = _backend_text(found.backend) if found else "nothing"
        yield Finding("desired", _member_text(member), _backend_text(backend), said)
    for member in plan.gone:
        said = _backend_text(installed.members[member].backend)
        yield Finding("desired", _member_text(member), "nothing", said)


def _apart(wanted: Entry, found: Entry) -> tuple[str, str]:
    """Describe two entries by what they differ in."""
    if wanted.choice != found.choice:
        return _entry_text(wanted), _entry_text(found)
    fields = [field for field in Entry._fields if getattr(wanted, field) != getattr(found, field)]
    texts = [
        ", ".join(f"{field} {getattr(entry, field)!s}" for field in fields)
        for entry in (wanted, found)
    ]
    return texts[0], texts[1]


def _entry_text(entry: Entry) -> str:
    backends = ", ".join(
        f"{backend}*{backend.weight}" if backend.weight != 1 else str(backend)
        for backend in entry.backends
    )
    return f"{entry.algorithm} of {backends or 'no backend'}"


def _backend_text(backend: Backend) -> str:
    return f"{backend.state}, weight {backend.weight}"


def _member_text(member: Member) -> str:
    where = endpoint(member.address, member.port)
    return f"{member.service} backend {where}/{member.protocol.lower()}"


# --- hooks ----------------------------------------------------------------------------------------


def _check_hooks(hooks: dict[AttachType, int], is_ours: Callable[[int], bool]) -> Iterator[Finding]:
    for hook in HOOKS:
        if hook not in hooks:
            yield Finding("hooks", hook.hook, "a program of ours", "none")
        elif not is_ours(hooks[hook]):
            found = f"program #{hooks[hook]}, which uses no map of ours"
            yield Finding("hooks", hook.hook, "a program of ours", found)


# --- sockets --------------------------------------------------------------------------------------


class _Live(NamedTuple):
    """Sockets that were balanced before `counts` were read, and after."""

    sockets: list[Socket]
    counts: dict[LiveKey, int]
    always_counted: bool


def _read_live(maps: BalanceMaps, sockets: Sockets) -> _Live:
    def identify(found: Socket) -> tuple[int, int]:
        return found.cookie, found.origin.since if found.origin else 0

    before = {identify(found) for found in sockets.balanced()}
    counts = dict(maps.live.items())
    lasting = [found for found in sockets.balanced() if identify(found) in before]
    return _Live(lasting, counts, maps.index_is_whole())


def _check_live(live: _Live, records: Records) -> Iterator[Finding]:
    known = {(b.service, b.address, b.port, b.protocol) for b in records.backends.values()}
    truth: Counter[LiveKey] = Counter()
    for found in live.sockets:
        origin = found.origin
        if origin is None:
            continue
        address, port = origin.backend_address, origin.backend_port
        if found.is_open and (origin.service, address, port, origin.protocol) not in known:
            said = f"{endpoint(unpack_address(address), port)}, which is gone"
            wanted = f"a backend of {records.services.get(origin.service, 'an installed service')}"
            yield Finding("live", _socket_text(found), wanted, said)
        if origin.counted & COUNTED_LIVE or (live.always_counted and found.is_open):
            truth[LiveKey(origin.netns, origin.service, origin.backend)] += 1
    for key, number in truth.items():
        counted = live.counts.get(key, 0)
        if counted < number:
            service = records.services.get(key.service, f"service {key.service}")
            where = f"{service} backend id {key.backend} in netns-cookie {key.netns}"
            yield Finding("live", where, f"{number} or more sockets counted", str(counted))


def _socket_text(found: Socket) -> str:
    local = endpoint(unpack_address(found.local_address), found.local_port)
    remote = endpoint(unpack_address(found.remote_address), found.remote_port)
    protocol = _PROTOCOLS[found.protocol].lower()
    return f"socket {local}>{remote}/{protocol}, cookie {found.cookie}"
