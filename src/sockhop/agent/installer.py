"""Reads the installed state from the pinned maps and applies plans to them.

Killed at any point, it leaves every frontend with its old backends or its new ones; what a dead
agent left half-written no word names, and the next one deletes it (:meth:`Installer.read`).
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from sockhop.agent.capacity import Usage, blocks_of, check_capacity, map_needs
from sockhop.agent.installed import read_installed
from sockhop.agent.plan import Installed, InstalledEntry, InstalledMember, Plan
from sockhop.agent.target import Entry, Member
from sockhop.datapath.balancer import BalanceMaps
from sockhop.datapath.policies import can_tell_cgroups
from sockhop.datapath.records import (
    BLOCK_ENTRIES,
    FRONTEND_TYPES,
    STATES,
    ClientKey,
    Counters,
    FrontendFlag,
    FrontendKey,
    Setting,
    SlotKey,
    word,
)
from sockhop.datapath.shares import alias_table, table_for
from sockhop.errors import SockhopError, SystemLackError
from sockhop.kernel.maps import Map
from sockhop.kernel.syscall import grace_period
from sockhop.model import Algorithm, Backend, Protocol, pack_address

__all__ = ["Installer", "ReadBackError", "table_bytes"]

Row = tuple[bytes, bytes]
"""An encoded key and value."""

_PROTOCOLS = {protocol.number: protocol for protocol in Protocol}
_PROTOCOL_NUMBERS = {protocol: number for number, protocol in _PROTOCOLS.items()}
_STATE_CODES = {state: code for code, state in enumerate(STATES)}
_TYPE_CODES = {kind: code for code, kind in enumerate(FRONTEND_TYPES)}


class ReadBackError(SockhopError):
    """The maps do not hold what was just written to them."""


class Installer:
    """Keeps the maps and its own picture of them, `installed`, the same."""

    def __init__(self, maps: BalanceMaps) -> None:
        self._maps = maps
        self.installed = Installed({}, {}, {})
        self._free: list[int] = []
        self._usage = Usage.of(())
        self._written: list[tuple[Map[Any, Any], list[Row]]] = []
        self.read()

    def read(self) -> None:
        """Take the picture from the maps, and delete what no reader can reach."""
        self.installed = read_installed(self._maps)
        self._usage = Usage.of(old.entry for old in self.installed.entries.values())
        used = {old.id for old in self.installed.entries.values()}
        self._free = [i for i in range(self._maps.words.max_entries - 1, -1, -1) if i not in used]
        self._maps.clients.delete_many(
            key for key in self._maps.clients.keys() if key.frontend not in used
        )
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
        self._note_redirects(self.installed.entries)

    def apply(self, plan: Plan) -> int:
        """Make the maps what *plan* says; return the generation that the change got.

        SystemLackError before anything is written where the kernel lacks what it needs,
        CapacityError before anything is written where a map has no room for it, ReadBackError
        where the maps hold something else afterwards.
        """
        if not plan:
            return self._maps.setting(Setting.GENERATION)
        _check_cgroups(plan)
        check_capacity(map_needs(plan, self.installed, self._usage, self._maps.sizes()))
        self._written.clear()
        generation = self._maps.setting(Setting.GENERATION) + 1
        self._set(Setting.GENERATION, generation)
        self._write_services(entry.service for entry in plan.added.values())
        self._write_members(plan.members)
        old = [self.installed.entries[key] for key in self._outdated(plan)]
        if any(key.layer for key in plan.added):
            self._note_redirects(plan.added)
        self._publish(plan, generation)
        for key in plan.removed:
            self._maps.frontends.delete(key)
            del self.installed.entries[key]
        if any(key.layer for key in plan.removed):
            self._note_redirects(self.installed.entries)
        # From here on no reader that can still see the old slots is running.
        grace_period()
        self._forget(old)
        new = Usage.of((*plan.added.values(), *plan.flipped.values()))
        self._usage = self._usage.plus(new).minus(Usage.of(was.entry for was in old))
        self._remove_members(plan.gone)
        self._read_back()
        return generation

    # --- parts of apply(), in its order -------------------------------------------------------

    def _write(self, target: Map[Any, Any], rows: Iterable[Row]) -> None:
        rows = list(rows)
        target.update_encoded(rows)
        self._written.append((target, rows))

    def _write_services(self, names: Iterable[str]) -> None:
        new = sorted(set(names) - self.installed.services.keys())
        ids = self._new_ids(Setting.NEXT_SERVICE, len(new))
        target = self._maps.services
        self._write(
            target,
            (
                (target.key.pack(number), target.value.pack(name.encode()))
                for number, name in zip(ids, new, strict=True)
            ),
        )
        self.installed.services.update(zip(new, ids, strict=True))

    def _write_members(self, members: Mapping[Member, Backend]) -> None:
        have, services = self.installed.members, self.installed.services
        new = [member for member in members if member not in have]
        ids = dict(zip(new, self._new_ids(Setting.NEXT_BACKEND, len(new)), strict=True))
        target, rows = self._maps.backends, []
        for member, backend in members.items():
            number = ids[member] if member in ids else have[member].id
            value = target.value.pack(
                number,
                services[member.service],
                pack_address(member.address),
                member.port,
                backend.weight,
                _PROTOCOL_NUMBERS[member.protocol],
                _STATE_CODES[backend.state],
            )
            rows.append((target.key.pack(number), value))
            have[member] = InstalledMember(backend, number)
        self._write(target, rows)

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
        self._write(maps.slots, self._slot_rows(changed))
        self._write(maps.tables, self._table_rows(changed.values()))
        for key, new in changed.items():
            if new.entry.algorithm is Algorithm.LEAST_CONNECTIONS:
                self._make_loads(key, new.entry)
        maps.counters.update_many((changed[key].id, Counters(0, 0)) for key in plan.added)
        self._write(
            maps.clients,
            (
                (maps.clients.key.pack(cgroup, changed[key].id), maps.clients.value.pack(said))
                for key, entry in plan.added.items()
                for cgroup, said in entry.cgroups
            ),
        )
        number, word = maps.words.key.pack, maps.words.value.pack
        self._write(maps.words, ((number(new.id), word(_word_of(new))) for new in changed.values()))
        entries.update(changed)
        for key, entry in plan.relabelled.items():
            entries[key] = entries[key]._replace(entry=entry)
        # The entry of one namespace first: the general one may send readers there.
        keys = sorted(plan.added.keys() | plan.relabelled.keys(), key=lambda k: not k.netns)
        self._write(maps.frontends, map(self._frontend_row, keys))

    def _forget(self, old: Iterable[InstalledEntry]) -> None:
        maps = self._maps
        kept = {entry.id for entry in self.installed.entries.values()}
        for entry in old:
            for chunks, n in (
                (maps.slots, len(entry.entry.backends)),
                (maps.tables, blocks_of(entry.entry)),
            ):
                chunks.delete_many(SlotKey(entry.id, entry.generation, i) for i in range(n))
            if entry.id not in kept:
                maps.clients.delete_many(ClientKey(c, entry.id) for c, _ in entry.entry.cgroups)
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

    def _read_back(self) -> None:
        for target, rows in self._written:
            if (key := target.first_difference(rows)) is not None:
                raise ReadBackError(
                    f"the map {target.name} does not hold at {key.hex()} what was written there",
                    hint="does something else write to the pinned maps? restart the agent",
                )
        self._written.clear()

    def _note_redirects(self, keys: Iterable[FrontendKey]) -> None:
        """Let the hooks look for redirects only where there may be some."""
        redirects = int(any(key.layer for key in keys))
        if self._maps.setting(Setting.REDIRECTS) != redirects:
            self._set(Setting.REDIRECTS, redirects)

    # --- records ------------------------------------------------------------------------------

    def _new_ids(self, setting: Setting, n: int) -> range:
        first = max(self._maps.setting(setting), 1)
        if n:
            self._set(setting, first + n)
        return range(first, first + n)

    def _set(self, setting: Setting, value: int) -> None:
        self._maps.settings.set(setting, value)

    def _frontend_row(self, key: FrontendKey) -> Row:
        new, target = self.installed.entries[key], self._maps.frontends
        encoded = target.key.encode(key)
        return encoded, target.value.pack(
            encoded,
            new.id,
            self.installed.services[new.entry.service],
            new.entry.affinity,
            _TYPE_CODES[new.entry.type],
            new.entry.flags,
        )

    def _slot_rows(self, changed: Mapping[FrontendKey, InstalledEntry]) -> Iterator[Row]:
        pack_key, pack_value = self._maps.slots.key.pack, self._maps.slots.value.pack
        for frontend, new in changed.items():
            backends = new.entry.backends
            shares = alias_table([backend.weight for backend in backends])
            for position, (backend, share) in enumerate(zip(backends, shares, strict=True)):
                key = pack_key(new.id, new.generation, position)
                yield (
                    key,
                    pack_value(
                        key,
                        self._member_id(frontend, new.entry, backend),
                        pack_address(backend.address),
                        share.keep,
                        share.alias,
                        backend.port,
                        backend.weight,
                        _STATE_CODES[backend.state],
                    ),
                )

    def _table_rows(self, changed: Iterable[InstalledEntry]) -> Iterator[Row]:
        pack_key, pack_value = self._maps.tables.key.pack, self._maps.tables.value.pack
        size = 2 * BLOCK_ENTRIES
        for new in changed:
            data = table_bytes(new.entry)
            for number in range(len(data) // size):
                key = pack_key(new.id, new.generation, number)
                yield key, pack_value(key, data[number * size : (number + 1) * size])

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


def _check_cgroups(plan: Plan) -> None:
    """Raise SystemLackError where the hooks could not tell for whom a frontend is."""
    for entry in plan.added.values():
        if entry.flags & FrontendFlag.CLIENTS and not can_tell_cgroups():
            raise SystemLackError(
                f"{entry.service}: clients.cgroups and clients.exclude need bpf_rdonly_cast, "
                "which this kernel (before Linux 6.2) does not have",
                hint="nothing was changed; leave them out, or use clients.namespaces",
            )


def _word_of(new: InstalledEntry) -> int:
    algorithm, backends = new.entry.choice
    return word(new.generation, algorithm, len(table_for(algorithm, backends)) or len(backends))


def table_bytes(entry: Entry) -> bytes:
    """Return the table of *entry* as its blocks hold it, padded to whole blocks."""
    table = table_for(*entry.choice).tobytes()
    return table + bytes(-len(table) % (2 * BLOCK_ENTRIES))
