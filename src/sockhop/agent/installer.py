"""Reads the installed state from the pinned maps and applies plans to them.

Killed at any point, it leaves every frontend with its old backends or its new ones; what a dead
agent left half-written no word names, and the next one deletes it (:meth:`Installer.read`).
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from sockhop.agent.installed import read_entry, read_installed, read_table
from sockhop.agent.plan import Installed, InstalledEntry, InstalledMember, Plan
from sockhop.agent.target import Entry, Member
from sockhop.datapath.balancer import BalanceMaps
from sockhop.datapath.records import (
    BLOCK_ENTRIES,
    FRONTEND_TYPES,
    STATES,
    BackendRecord,
    Counters,
    FrontendKey,
    FrontendRecord,
    ServiceRecord,
    Setting,
    SlotKey,
    SlotRecord,
    TableBlock,
    word,
)
from sockhop.datapath.shares import alias_table, table_for
from sockhop.errors import SockhopError, SystemLackError
from sockhop.kernel.maps import Map
from sockhop.kernel.syscall import grace_period
from sockhop.model import Algorithm, Backend, Protocol, pack_address

__all__ = ["CapacityError", "Installer", "ReadBackError", "check_capacity"]

_PROTOCOLS = {protocol.number: protocol for protocol in Protocol}
_STATE_CODES = {state: code for code, state in enumerate(STATES)}
_TYPE_CODES = {kind: code for code, kind in enumerate(FRONTEND_TYPES)}


class CapacityError(SystemLackError):
    """A map has no room for a plan. Nothing was written."""


class ReadBackError(SockhopError):
    """The maps do not hold what was just written to them."""


def check_capacity(plan: Plan, have: Installed, maps: BalanceMaps) -> None:
    """Raise CapacityError where a map has no room for *plan*, made against *have*."""
    names = {entry.service for entry in plan.added.values()} - have.services.keys()
    entries = [old.entry for old in have.entries.values()]
    changed = [*plan.added.values(), *plan.flipped.values()]
    # Until the grace period is over, old and new stand side by side.
    needs: tuple[tuple[Map[Any, Any], int], ...] = (
        (maps.frontends, len(have.entries.keys() | plan.added.keys())),
        (maps.words, len(entries) + len(plan.added)),
        (maps.slots, sum(len(entry.backends) for entry in entries + changed)),
        (maps.tables, sum(_blocks(entry) for entry in entries + changed)),
        (maps.backends, len(have.members.keys() | plan.members.keys())),
        (maps.services, len(have.services) + len(names)),
    )
    for target, need in needs:
        if need > target.max_entries:
            raise CapacityError(
                f"the map {target.name} has room for {target.max_entries:,} entries, "
                f"this change needs {need:,}",
                hint="nothing was changed; a larger size is set by `sockhop detach` and then "
                f"`sockhop agent --map-size {target.name}={need}`",
            )


def _blocks(entry: Entry) -> int:
    return -(-len(table_for(*entry.choice)) // BLOCK_ENTRIES)


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
        orphans = [i for i, value in self._maps.words.items() if value and i not in used]
        self._maps.words.update_many((number, 0) for number in orphans)
        current = {(old.id, old.generation) for old in self.installed.entries.values()}
        waste = [
            (chunks, [key for key in chunks.keys() if key[:2] not in current])
            for chunks in (self._maps.slots, self._maps.tables)
        ]
        if any(keys for _, keys in waste):
            grace_period()
        for chunks, keys in waste:
            chunks.delete_many(keys)
        named = {old.entry.service for old in self.installed.entries.values()}
        self._remove_members([m for m in self.installed.members if m.service not in named])

    def apply(self, plan: Plan) -> int:
        """Make the maps what *plan* says; return the generation that the change got.

        CapacityError before anything is written where a map has no room for it.
        """
        if not plan:
            return self._maps.setting(Setting.GENERATION)
        check_capacity(plan, self.installed, self._maps)
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
            found = read_entry(self._maps, key)
            same = found == wanted and (
                wanted is None or read_table(self._maps, wanted) == _table_bytes(wanted.entry)
            )
            if not same:
                raise ReadBackError(
                    f"the maps hold {found} for {key}, not {wanted} as was written",
                    hint="does something else write to the pinned maps? restart the agent",
                )

    def forget_dead_counts(self) -> None:
        """Delete live counts of 0 of backends that are gone: no hook can choose those any more."""
        known = {old.id for old in self.installed.members.values()}
        live = self._maps.live
        live.delete_many(
            key for key, count in live.items() if not count and key.backend not in known
        )

    # --- parts of apply(), in its order -------------------------------------------------------

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
                    record.id,
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
        maps.tables.update_many(block for new in changed.values() for block in self._table_of(new))
        for key, new in changed.items():
            if new.entry.algorithm is Algorithm.LEAST_CONNECTIONS:
                self._make_loads(key, new.entry)
        maps.counters.update_many((changed[key].id, Counters(0, 0)) for key in plan.added)
        maps.words.update_many((new.id, _word_of(new)) for new in changed.values())
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
            for chunks, n in (
                (maps.slots, len(entry.entry.backends)),
                (maps.tables, _blocks(entry.entry)),
            ):
                chunks.delete_many(SlotKey(entry.id, entry.generation, i) for i in range(n))
            if entry.id not in kept:
                maps.words.set(entry.id, 0)
                self._free.append(entry.id)

    def _remove_members(self, gone: Iterable[Member]) -> None:
        for member in gone:
            number = self.installed.members.pop(member).id
            self._maps.backends.delete(number)
            self._maps.loads.delete(number)
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
            new.entry.affinity,
            _TYPE_CODES[new.entry.type],
            new.entry.flags,
        )

    def _slots_of(
        self, key: FrontendKey, new: InstalledEntry
    ) -> Iterator[tuple[SlotKey, SlotRecord]]:
        encode = self._maps.slot_key.encode
        shares = alias_table([backend.weight for backend in new.entry.backends])
        for index, (backend, share) in enumerate(zip(new.entry.backends, shares, strict=True)):
            slot = SlotKey(new.id, new.generation, index)
            yield (
                slot,
                SlotRecord(
                    encode(slot),
                    self._member_id(key, new.entry, backend),
                    pack_address(backend.address),
                    share.keep,
                    share.alias,
                    backend.port,
                    backend.weight,
                    _STATE_CODES[backend.state],
                ),
            )

    def _table_of(self, new: InstalledEntry) -> Iterator[tuple[SlotKey, TableBlock]]:
        data, size = _table_bytes(new.entry), 2 * BLOCK_ENTRIES
        for number in range(len(data) // size):
            key = SlotKey(new.id, new.generation, number)
            block = data[number * size : (number + 1) * size]
            yield key, TableBlock(self._maps.slot_key.encode(key), block)

    def _make_loads(self, key: FrontendKey, entry: Entry) -> None:
        for backend in entry.backends:
            number = self._member_id(key, entry, backend)
            if self._maps.loads.get(number) is None:
                self._maps.loads.set(number, 0)

    def _member_id(self, key: FrontendKey, entry: Entry, backend: Backend) -> int:
        protocol = _PROTOCOLS[key.protocol]
        return self.installed.members[
            Member(entry.service, backend.address, backend.port, protocol)
        ].id


def _word_of(new: InstalledEntry) -> int:
    algorithm, backends = new.entry.choice
    return word(new.generation, algorithm, len(table_for(algorithm, backends)) or len(backends))


def _table_bytes(entry: Entry) -> bytes:
    table = table_for(*entry.choice).tobytes()
    return table + bytes(-len(table) % (2 * BLOCK_ENTRIES))
