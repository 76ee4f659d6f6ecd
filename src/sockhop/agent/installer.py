"""Reads the installed state from the pinned maps and applies plans to them.

Killed at any point, it leaves every frontend with its old backends or its new ones; what a dead
agent left half-written no word names, and the next one deletes it (:meth:`Installer.read`).
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from sockhop.agent.plan import Installed, InstalledEntry, InstalledMember, Plan
from sockhop.agent.target import Entry, Member
from sockhop.datapath.alias import alias_table
from sockhop.datapath.balancer import BalanceMaps
from sockhop.datapath.records import (
    FRONTEND_TYPES,
    STATES,
    BackendRecord,
    Counters,
    FrontendFlag,
    FrontendKey,
    FrontendRecord,
    ServiceRecord,
    Setting,
    SlotKey,
    SlotRecord,
    word,
    word_count,
    word_generation,
)
from sockhop.errors import SockhopError, SystemLackError
from sockhop.kernel.maps import Map
from sockhop.kernel.syscall import grace_period
from sockhop.model import Backend, Protocol, pack_address, unpack_address

__all__ = ["CapacityError", "Installer", "ReadBackError", "map_usage", "read_installed"]

_PROTOCOLS = {protocol.number: protocol for protocol in Protocol}
_STATE_CODES = {state: code for code, state in enumerate(STATES)}
_TYPE_CODES = {kind: code for code, kind in enumerate(FRONTEND_TYPES)}

Slots = dict[tuple[int, int], list[tuple[SlotKey, SlotRecord]]]


class CapacityError(SystemLackError):
    """A map has no room for a plan. Nothing was written."""


class ReadBackError(SockhopError):
    """The maps do not hold what was just written to them."""


def read_installed(maps: BalanceMaps) -> Installed:
    """Return what the maps hold: what the hooks would do, not what anybody meant."""
    names = {number: _text(record.name) for number, record in maps.services.items()}
    members = {}
    for number, record in maps.backends.items():
        if record.service in names:
            member = Member(
                names[record.service],
                unpack_address(record.address),
                record.port,
                _PROTOCOLS[record.protocol],
            )
            backend = Backend(*member[1:3], STATES[record.state], record.weight)
            members[member] = InstalledMember(backend, number)
    words, slots = dict(maps.words.items()), _slots(maps)
    entries = {
        key: _installed_entry(record, names.get(record.service, ""), words[record.id], slots)
        for key, record in maps.frontends.items()
    }
    return Installed(entries, members, {name: number for number, name in names.items()})


def map_usage(maps: BalanceMaps) -> Iterator[tuple[str, int, int]]:
    """Yield each map that fills up: its name, its entries, and how many it has room for."""
    for counted in (maps.frontends, maps.slots, maps.backends, maps.services, maps.live):
        yield counted.name, counted.used(), counted.max_entries


class Installer:
    """Keeps the maps and its own picture of them, `installed`, the same."""

    def __init__(self, maps: BalanceMaps) -> None:
        self._maps = maps
        self.installed = Installed({}, {}, {})
        self._free: list[int] = []
        self.read()

    def read(self) -> None:
        """Take the picture from the maps, and delete what no reader can reach."""
        self.installed = read_installed(self._maps)
        used = {old.id for old in self.installed.entries.values()}
        self._free = [i for i in range(self._maps.words.max_entries - 1, -1, -1) if i not in used]
        current = {(old.id, old.generation) for old in self.installed.entries.values()}
        unreachable = [key for key in self._maps.slots.keys() if key[:2] not in current]
        if unreachable:
            grace_period()
            self._maps.slots.delete_many(unreachable)
        named = {old.entry.service for old in self.installed.entries.values()}
        self._remove_members([m for m in self.installed.members if m.service not in named])

    def apply(self, plan: Plan) -> int:
        """Make the maps what *plan* says; return the generation that the change got.

        CapacityError before anything is written where a map has no room for it.
        """
        if not plan:
            return self._maps.setting(Setting.GENERATION)
        self._check_capacity(plan)
        generation = self._maps.setting(Setting.GENERATION) + 1
        self._set(Setting.GENERATION, generation)
        self._write_services(entry.service for entry in plan.added.values())
        self._write_members(plan.members)
        old = [self.installed.entries[key] for key in self._outdated(plan)]
        self._publish(plan, generation)
        for key in plan.removed:
            self._maps.frontends.delete(key)
            del self.installed.entries[key]
        # From here on no reader that can still see the old slots is running.
        grace_period()
        self._forget(old)
        self._remove_members(plan.gone)
        return generation

    def check(self, keys: Iterable[FrontendKey]) -> None:
        """Read the entries of *keys* back; ReadBackError where the maps hold something else."""
        for key in keys:
            wanted = self.installed.entries.get(key)
            found = self._read_entry(key)
            if found != wanted:
                raise ReadBackError(
                    f"the maps hold {found} for {key}, not {wanted} as was written",
                    hint="does something else write to the pinned maps? restart the agent",
                )

    # --- parts of apply(), in its order -------------------------------------------------------

    def _check_capacity(self, plan: Plan) -> None:
        have, maps = self.installed, self._maps
        fresh = {entry.service for entry in plan.added.values()} - have.services.keys()
        new_slots = sum(len(e.backends) for e in (plan.added | plan.flipped).values())
        old_slots = sum(len(old.entry.backends) for old in have.entries.values())
        new_members = sum(member not in have.members for member in plan.members)
        added = sum(key not in have.entries for key in plan.added)
        needs: tuple[tuple[Map[Any, Any], int], ...] = (
            (maps.frontends, len(have.entries) + added),
            # Until the grace period is over, an entry that changes hands has two words.
            (maps.words, len(have.entries) + len(plan.added)),
            (maps.slots, old_slots + new_slots),
            (maps.backends, len(have.members) + new_members),
            (maps.services, len(have.services) + len(fresh)),
        )
        for target, need in needs:
            if need > target.max_entries:
                raise CapacityError(
                    f"the map {target.name} has room for {target.max_entries:,} entries, "
                    f"this change needs {need:,}",
                    hint="nothing was changed; use fewer services or backends on this node",
                )

    def _write_services(self, names: Iterable[str]) -> None:
        new = sorted(set(names) - self.installed.services.keys())
        ids = self._new_ids(Setting.NEXT_SERVICE, len(new))
        self._maps.services.update_many(
            (number, ServiceRecord(name.encode())) for number, name in zip(ids, new, strict=True)
        )
        self.installed.services.update(zip(new, ids, strict=True))

    def _write_members(self, members: Mapping[Member, Backend]) -> None:
        have = self.installed.members
        new = [member for member in members if member not in have]
        ids = dict(zip(new, self._new_ids(Setting.NEXT_BACKEND, len(new)), strict=True))
        services = self.installed.services
        records = {
            member: InstalledMember(backend, ids[member] if member in ids else have[member].id)
            for member, backend in members.items()
        }
        self._maps.backends.update_many(
            (
                record.id,
                BackendRecord(
                    services[member.service],
                    pack_address(member.address),
                    member.port,
                    record.backend.weight,
                    member.protocol.number,
                    _STATE_CODES[record.backend.state],
                ),
            )
            for member, record in records.items()
        )
        have.update(records)

    def _outdated(self, plan: Plan) -> Iterator[FrontendKey]:
        yield from plan.removed
        yield from plan.flipped
        yield from (key for key in plan.added if key in self.installed.entries)

    def _publish(self, plan: Plan, generation: int) -> None:
        """Write the slots, then the words, then the keys: each names only what is there."""
        maps, entries = self._maps, self.installed.entries
        changed = {
            key: InstalledEntry(e, self._free.pop(), generation) for key, e in plan.added.items()
        }
        changed |= {
            key: InstalledEntry(entry, entries[key].id, generation)
            for key, entry in plan.flipped.items()
        }
        maps.slots.update_many(
            slot for key, new in changed.items() for slot in self._slots_of(key, new)
        )
        maps.counters.update_many((changed[key].id, Counters(0, 0)) for key in plan.added)
        maps.words.update_many(
            (new.id, word(generation, len(new.entry.backends))) for new in changed.values()
        )
        entries.update(changed)
        for key, entry in plan.relabelled.items():
            entries[key] = entries[key]._replace(entry=entry)
        # The entry of one namespace first: the general one may send readers there.
        keys = sorted(plan.added.keys() | plan.relabelled.keys(), key=lambda k: not k.netns)
        maps.frontends.update_many((key, self._frontend_record(key)) for key in keys)

    def _forget(self, old: Iterable[InstalledEntry]) -> None:
        maps = self._maps
        kept = {entry.id for entry in self.installed.entries.values()}
        for entry in old:
            maps.slots.delete_many(
                SlotKey(entry.id, entry.generation, i) for i in range(len(entry.entry.backends))
            )
            if entry.id not in kept:
                maps.words.set(entry.id, 0)
                self._free.append(entry.id)

    def _remove_members(self, gone: Iterable[Member]) -> None:
        for member in gone:
            self._maps.backends.delete(self.installed.members.pop(member).id)
        used = {old.entry.service for old in self.installed.entries.values()}
        for name in self.installed.services.keys() - used:
            self._maps.services.delete(self.installed.services.pop(name))

    # --- records ------------------------------------------------------------------------------

    def _new_ids(self, setting: Setting, n: int) -> range:
        first = max(self._maps.setting(setting), 1)
        if n:
            self._set(setting, first + n)
        return range(first, first + n)

    def _set(self, setting: Setting, value: int) -> None:
        self._maps.settings.set(setting, value)

    def _frontend_record(self, key: FrontendKey) -> FrontendRecord:
        new = self.installed.entries[key]
        return FrontendRecord(
            self._maps.frontend_key.encode(key),
            new.id,
            self.installed.services[new.entry.service],
            _TYPE_CODES[new.entry.type],
            new.entry.flags,
        )

    def _slots_of(
        self, key: FrontendKey, new: InstalledEntry
    ) -> Iterator[tuple[SlotKey, SlotRecord]]:
        protocol, encode = _PROTOCOLS[key.protocol], self._maps.slot_key.encode
        shares = alias_table([backend.weight for backend in new.entry.backends])
        for index, (backend, share) in enumerate(zip(new.entry.backends, shares, strict=True)):
            member = Member(new.entry.service, backend.address, backend.port, protocol)
            slot = SlotKey(new.id, new.generation, index)
            yield (
                slot,
                SlotRecord(
                    encode(slot),
                    self.installed.members[member].id,
                    pack_address(backend.address),
                    share.keep,
                    share.alias,
                    backend.port,
                    backend.weight,
                    _STATE_CODES[backend.state],
                ),
            )

    def _read_entry(self, key: FrontendKey) -> InstalledEntry | None:
        record = self._maps.frontends.get(key)
        if record is None:
            return None
        value = self._maps.words.get(record.id) or 0
        generation = word_generation(value)
        keys = [SlotKey(record.id, generation, i) for i in range(word_count(value))]
        found = [(slot, self._maps.slots.get(slot)) for slot in keys]
        slots = {(record.id, generation): [(k, v) for k, v in found if v is not None]}
        service = self._maps.services.get(record.service)
        return _installed_entry(record, _text(service.name) if service else "", value, slots)


def _text(name: bytes) -> str:
    return name.rstrip(b"\0").decode(errors="replace")


def _slots(maps: BalanceMaps) -> Slots:
    found: Slots = defaultdict(list)
    for key, slot in maps.slots.items():
        found[key.frontend, key.generation].append((key, slot))
    return found


def _installed_entry(
    record: FrontendRecord, service: str, value: int, slots: Slots
) -> InstalledEntry:
    generation, count = word_generation(value), word_count(value)
    found = sorted(slots.get((record.id, generation), ()))
    backends = tuple(
        Backend(unpack_address(slot.address), slot.port, STATES[slot.state], slot.weight)
        for key, slot in found
        if key.position < count
    )
    entry = Entry(service, FRONTEND_TYPES[record.type], FrontendFlag(record.flags), backends)
    return InstalledEntry(entry, record.id, generation)
