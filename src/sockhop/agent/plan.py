"""The difference between what should be and what is installed: printable, then applied."""

from collections.abc import Iterator
from typing import NamedTuple

from sockhop.agent.target import Entry, Member, Target
from sockhop.datapath.records import FrontendFlag, FrontendKey
from sockhop.kernel.netns import inode
from sockhop.model import Backend, Frontend, Protocol, unpack_address

__all__ = [
    "NOWHERE_ELSE",
    "Change",
    "Installed",
    "InstalledEntry",
    "InstalledMember",
    "Plan",
    "make_plan",
    "scope_of",
]

NOWHERE_ELSE = "nowhere else"
"""The scope of an entry that is no frontend: it says that others are looked up by namespace."""


class InstalledEntry(NamedTuple):
    """An entry that the hooks find, with the id of its word and the generation in it."""

    entry: Entry
    id: int
    generation: int


class InstalledMember(NamedTuple):
    """A backend that the map `backends` names, with its id."""

    backend: Backend
    id: int


class Installed(NamedTuple):
    """What the maps hold, by the same keys as a :class:`Target`."""

    entries: dict[FrontendKey, InstalledEntry]
    members: dict[Member, InstalledMember]
    services: dict[str, int]

    def part(self, *targets: Target) -> "Installed":
        """Return what of it *targets* name, the services whole."""
        keys = {key: self.entries.get(key) for target in targets for key in target.entries}
        members = {
            member: self.members.get(member) for target in targets for member in target.members
        }
        return Installed(
            {key: entry for key, entry in keys.items() if entry},
            {member: found for member, found in members.items() if found},
            self.services,
        )


class Change(NamedTuple):
    """What clients of one frontend meet; `sign` is + for a new one, - for one that goes, else ~."""

    sign: str
    key: FrontendKey
    entry: Entry
    detail: str = ""

    @property
    def is_met(self) -> bool:
        """Whether any client can meet it: not what only says that there is nothing elsewhere."""
        return bool(self.key.netns) or FrontendFlag.ABSENT not in self.entry.flags

    def line(self, own_cookie: int) -> str:
        """Return it in a line; *own_cookie* is that of this thread's network namespace."""
        key, service = self.key, self.entry.service
        protocol = next(p for p in Protocol if p.number == key.protocol)
        frontend = Frontend(unpack_address(key.address), key.port, protocol)
        scope = scope_of(key, self.entry.flags, own_cookie)
        where = "" if scope == "everywhere" else f" ({scope})"
        detail = f": {self.detail}" if self.detail else ""
        return f"{self.sign} {service} {frontend}{where}{detail}"


class Plan(NamedTuple):
    """What makes the installed state the target.

    added: entries that are not there, or are of another service or for other cgroups; flipped:
    entries with other backends or another algorithm; relabelled: entries with another scope, type
    or affinity; removed: entries to take away.
    members, gone: backends to write (new, or with another weight or state) and to take away.
    """

    added: dict[FrontendKey, Entry]
    flipped: dict[FrontendKey, Entry]
    relabelled: dict[FrontendKey, Entry]
    removed: dict[FrontendKey, Entry]
    members: dict[Member, Backend]
    gone: tuple[Member, ...]

    def __bool__(self) -> bool:
        return any(self)

    @property
    def frontends(self) -> int:
        """How many lines :meth:`changes` yields."""
        return sum(map(len, self[:4]))

    def changes(self, installed: Installed) -> Iterator[Change]:
        """Yield each change of what clients meet, made against *installed*."""
        for key, entry in self.added.items():
            yield Change("+", key, entry, _size(entry.backends))
        for key, entry in self.flipped.items():
            before = set(installed.entries[key].entry.backends)
            after = set(entry.backends)
            changes = [f"+{_text(backend)}" for backend in sorted(after - before)]
            changes += [f"-{_text(backend)}" for backend in sorted(before - after)]
            if entry.algorithm is not installed.entries[key].entry.algorithm:
                changes.append(entry.algorithm)
            yield Change("~", key, entry, f"{_size(entry.backends)}: {' '.join(changes)}")
        for key, entry in self.relabelled.items():
            yield Change("~", key, entry, _relabelling(installed.entries[key].entry, entry))
        for key, entry in self.removed.items():
            yield Change("-", key, entry)


def make_plan(target: Target, installed: Installed) -> Plan:
    """Compare *target* with what is *installed*."""
    plan = Plan(
        added={},
        flipped={},
        relabelled={},
        removed={
            key: old.entry for key, old in installed.entries.items() if key not in target.entries
        },
        members={
            member: backend
            for member, backend in target.members.items()
            if (old := installed.members.get(member)) is None or old.backend != backend
        },
        gone=tuple(member for member in installed.members if member not in target.members),
    )
    for key, entry in target.entries.items():
        found = installed.entries.get(key)
        if found is None or found.entry.identity != entry.identity:
            plan.added[key] = entry
            continue
        if found.entry.choice != entry.choice:
            plan.flipped[key] = entry
        if found.entry.label != entry.label:
            plan.relabelled[key] = entry
    return plan


def scope_of(key: FrontendKey, flags: FrontendFlag, own_cookie: int) -> str:
    """Return where a frontend holds: everywhere, in one network namespace, or in all others.

    A namespace is named by its inode if it is this thread's, whose cookie is *own_cookie*, else
    by its cookie, from which the kernel leads to no name.
    """
    if key.netns:
        own = key.netns == own_cookie
        return f"netns {inode()}" if own else f"netns-cookie {key.netns}"
    if FrontendFlag.ABSENT in flags:
        return NOWHERE_ELSE
    return "elsewhere" if FrontendFlag.SCOPED in flags else "everywhere"


def _relabelling(old: Entry, new: Entry) -> str:
    """Say what differs in the labels of two entries."""
    flags, changed = FrontendFlag, old.flags ^ new.flags
    parts = []
    if changed & (flags.SCOPED | flags.ABSENT):
        parts.append("scope")
    if changed & (flags.CLIENTS | flags.LISTED_ONLY):
        parts.append("clients")
    if changed & flags.RESERVED:
        parts.append("reserved" if flags.RESERVED in new.flags else "not reserved")
    if old.type != new.type:
        parts.append(f"type {new.type}")
    if old.affinity != new.affinity:
        parts.append(f"affinity {new.affinity} s" if new.affinity else "no affinity")
    return ", ".join(parts)


def _size(backends: tuple[Backend, ...]) -> str:
    return f"{len(backends)} backend{'' if len(backends) == 1 else 's'}"


def _text(backend: Backend) -> str:
    return f"{backend}*{backend.weight}" if backend.weight != 1 else str(backend)
