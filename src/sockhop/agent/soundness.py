"""Whether the pinned maps agree with themselves: a reader that follows them finds all it needs.

What it cannot make sense of is a finding, not an error.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Set
from typing import NamedTuple, TypeVar

import msgspec

from sockhop.agent.installer import table_bytes
from sockhop.agent.target import Entry
from sockhop.datapath.balancer import BalanceMaps
from sockhop.datapath.records import (
    ALGORITHMS,
    BLOCK_ENTRIES,
    FRONTEND_TYPES,
    STATES,
    BackendRecord,
    Client,
    ClientKey,
    FrontendFlag,
    FrontendKey,
    FrontendRecord,
    Setting,
    SlotKey,
    SlotRecord,
    TableBlock,
    word_algorithm,
    word_count,
    word_generation,
)
from sockhop.datapath.shares import alias_table, table_for
from sockhop.model import Algorithm, Backend, Protocol, endpoint, unpack_address

__all__ = [
    "Finding",
    "Records",
    "check_records",
    "frontend_text",
    "orphans",
    "read_records",
    "steady_frontends",
]

V = TypeVar("V")

_PROTOCOLS = {protocol.number: protocol for protocol in Protocol}
_TABLED = (Algorithm.ROUND_ROBIN, Algorithm.MAGLEV)
_FLAGS = sum(map(int, FrontendFlag))


class Finding(msgspec.Struct, frozen=True):
    """A difference. `check`: what was compared; `where`: in what."""

    check: str
    where: str
    expected: str
    found: str


class Records(NamedTuple):
    """What the maps hold; slots and blocks of tables by (id of the word, generation)."""

    settings: dict[int, int]
    frontends: dict[FrontendKey, FrontendRecord]
    words: dict[int, int]
    slots: dict[tuple[int, int], dict[int, SlotRecord]]
    tables: dict[tuple[int, int], dict[int, TableBlock]]
    backends: dict[int, BackendRecord]
    services: dict[int, str]
    clients: dict[ClientKey, int]
    loads: dict[int, int]


def read_records(maps: BalanceMaps) -> Records:
    """Read the maps, those that name others first."""
    return Records(
        dict(maps.settings.items()),
        dict(maps.frontends.items()),
        {number: word for number, word in maps.words.items() if word},
        _grouped(maps.slots.items()),
        _grouped(maps.tables.items()),
        dict(maps.backends.items()),
        {
            number: record.name.rstrip(b"\0").decode(errors="replace")
            for number, record in maps.services.items()
        },
        dict(maps.clients.items()),
        dict(maps.loads.items()),
    )


def frontend_text(key: FrontendKey) -> str:
    """Return a frontend as `10.0.0.10:80/tcp`, in one namespace with its cookie."""
    protocol = _PROTOCOLS[key.protocol].lower() if key.protocol in _PROTOCOLS else key.protocol
    where = f" in netns-cookie {key.netns}" if key.netns else ""
    return f"{endpoint(unpack_address(key.address), key.port)}/{protocol}{where}"


def steady_frontends(maps: BalanceMaps, records: Records) -> set[FrontendKey]:
    """Return the frontends that are as they were when *records* were read.

    Where a word is the same, all that it names has been there meanwhile.
    """
    now = dict(maps.frontends.items())
    words = maps.words.get_many(frontend.id for frontend in now.values())
    return {
        key
        for key, frontend in now.items()
        if records.frontends.get(key) == frontend
        and records.words.get(frontend.id, 0) == words.get(frontend.id, 0)
    }


def check_records(
    maps: BalanceMaps, records: Records, steady: Set[FrontendKey]
) -> Iterator[Finding]:
    """Yield what a reader would stumble over; of the frontends, in those that are *steady*."""
    yield from _check_backends(records)
    owners: dict[int, FrontendKey] = {}
    for key in sorted(steady):
        frontend = records.frontends[key]
        title = f"{records.services.get(frontend.service, '?')} {frontend_text(key)}"
        checker = _EntryChecker(maps, records, title, key, frontend)
        yield from checker.check_frontend()
        first = owners.setdefault(frontend.id, key)
        if first != key:
            yield checker.finding("id", "one of its own", f"that of {frontend_text(first)}")
        else:
            yield from checker.check_word()


def orphans(records: Records) -> Iterator[str]:
    """Yield what no reader can reach, a line a map: an agent that starts removes it."""
    used = {frontend.id for frontend in records.frontends.values()}
    current = {(i, word_generation(word)) for i, word in records.words.items() if i in used}
    named = {frontend.service for frontend in records.frontends.values()}
    for name, keys in (
        ("words", records.words.keys() - used),
        ("slots", [k for at, of in records.slots.items() if at not in current for k in of]),
        ("tables", [k for at, of in records.tables.items() if at not in current for k in of]),
        ("clients", [key for key in records.clients if key.frontend not in used]),
        ("services", records.services.keys() - named),
        ("backends", [i for i, b in records.backends.items() if b.service not in named]),
    ):
        if keys:
            yield f"map {name}: {len(keys):,} that nothing leads to"


def _check_backends(records: Records) -> Iterator[Finding]:
    known: dict[tuple[int, bytes, int, int], int] = {}
    for number, record in sorted(records.backends.items()):
        where = f"backend {number}"
        if record.id != number:
            yield Finding("installed", where, f"id {number}", f"id {record.id}")
        if record.state >= len(STATES):
            yield Finding("installed", where, f"a state below {len(STATES)}", str(record.state))
        if record.protocol not in _PROTOCOLS:
            yield Finding("installed", where, "a known protocol", str(record.protocol))
        if record.service not in records.services:
            yield Finding("installed", where, "a known service", f"service {record.service}")
        identity = (record.service, record.address, record.port, record.protocol)
        if (first := known.setdefault(identity, number)) != number:
            yield Finding("installed", where, "a backend of its own", f"that of id {first}")
        if not 0 < number < records.settings.get(Setting.NEXT_BACKEND, 0):
            yield Finding("installed", where, "an id that was given", "one yet to be given")


class _EntryChecker:
    """Follows one frontend as a hook does."""

    def __init__(
        self,
        maps: BalanceMaps,
        records: Records,
        title: str,
        key: FrontendKey,
        frontend: FrontendRecord,
    ) -> None:
        self._maps = maps
        self._records = records
        self._title = title
        self._key = key
        self._frontend = frontend

    def finding(self, part: str, expected: str, found: str) -> Finding:
        return Finding("installed", f"{self._title}: {part}", expected, found)

    def check_frontend(self) -> Iterator[Finding]:
        key, frontend, records = self._key, self._frontend, self._records
        encoded = self._maps.frontend_key.encode(key)
        if frontend.key != encoded:
            yield self.finding("repeated key", encoded.hex(), frontend.key.hex())
        if frontend.type >= len(FRONTEND_TYPES):
            yield self.finding("type", f"below {len(FRONTEND_TYPES)}", str(frontend.type))
        if frontend.flags & ~_FLAGS:
            yield self.finding("flags", f"some of {_FLAGS:#x}", f"{frontend.flags:#x}")
        if frontend.service not in records.services:
            yield self.finding("service", "one that is known", f"id {frontend.service}")
        if key.netns:
            general = records.frontends.get(key._replace(netns=0))
            if general is None or not general.flags & FrontendFlag.SCOPED:
                yield self.finding("general entry", "one that leads here", "none")
        said = [value for at, value in records.clients.items() if at.frontend == frontend.id]
        if said and not frontend.flags & FrontendFlag.CLIENTS:
            yield self.finding("flags", "CLIENTS, since cgroups are listed", f"{frontend.flags:#x}")
        for value in set(said) - set(Client):
            yield self.finding("clients", "served or excluded", str(value))

    def check_word(self) -> Iterator[Finding]:
        word = self._records.words.get(self._frontend.id, 0)
        generation, latest = word_generation(word), self._records.settings.get(Setting.GENERATION)
        if not 0 < generation <= (latest or 0):
            yield self.finding("generation", f"1 to {latest}", str(generation))
            return
        if (word >> 28 & 0xF) >= len(ALGORITHMS):
            yield self.finding("algorithm", f"below {len(ALGORITHMS)}", str(word >> 28 & 0xF))
            return
        at = (self._frontend.id, generation)
        slots = self._records.slots.get(at, {})
        count, tabled = word_count(word), word_algorithm(word) in _TABLED
        missing = [i for i in range(max(slots, default=-1) if tabled else count) if i not in slots]
        for position in missing:
            yield self.finding(f"slot {position}", "a backend", "nothing")
        if not tabled and len(slots) > count:
            yield self.finding("word", f"{len(slots)} backends", f"{count}")
        for position, slot in slots.items():
            yield from self._check_slot(SlotKey(*at, position), slot)
        if missing or not all(slot.weight for slot in slots.values()):
            return
        entry = self._entry(word, [slots[i] for i in sorted(slots)])
        yield from self._check_shares(slots, entry)
        if tabled:
            yield from self._check_table(at, count, entry)

    def _check_slot(self, key: SlotKey, slot: SlotRecord) -> Iterator[Finding]:
        part, encoded = f"slot {key.position}", self._maps.slot_key.encode(key)
        if slot.key != encoded:
            yield self.finding(f"{part}: repeated key", encoded.hex(), slot.key.hex())
        if not slot.weight:
            yield self.finding(part, "a weight above 0", "0")
        record = self._records.backends.get(slot.backend)
        if record is None:
            yield self.finding(part, "a known backend", f"id {slot.backend}")
            return
        said, known = (
            (endpoint(unpack_address(b.address), b.port), b.weight, b.state) for b in (slot, record)
        )
        if said != known:
            yield self.finding(part, _text(known), _text(said))
        if (record.service, record.protocol) != (self._frontend.service, self._key.protocol):
            yield self.finding(part, "a backend of the service", f"id {slot.backend}, which is not")
        word = self._records.words[key.frontend]
        counts = word_algorithm(word) is Algorithm.LEAST_CONNECTIONS
        if counts and slot.backend not in self._records.loads:
            yield self.finding(part, "a load to count in", "none")

    def _check_shares(self, slots: dict[int, SlotRecord], entry: Entry) -> Iterator[Finding]:
        shares = alias_table([backend.weight for backend in entry.backends])
        for position, share in enumerate(shares):
            slot = slots[position]
            if (slot.keep, slot.alias) != tuple(share):
                yield self.finding(
                    f"slot {position}: share",
                    f"keep {share.keep}, alias {share.alias}",
                    f"keep {slot.keep}, alias {slot.alias}",
                )

    def _check_table(self, at: tuple[int, int], count: int, entry: Entry) -> Iterator[Finding]:
        data, size = table_bytes(entry), 2 * BLOCK_ENTRIES
        blocks = self._records.tables.get(at, {})
        wanted = [data[i : i + size] for i in range(0, len(data), size)]
        if (entries := len(table_for(*entry.choice))) != count:
            yield self.finding("word", f"{entries} entries of a table", str(count))
        for number, block in enumerate(wanted):
            part, found = f"table block {number}", blocks.get(number)
            encoded = self._maps.slot_key.encode(SlotKey(*at, number))
            if found is None:
                yield self.finding(part, "positions of backends", "nothing")
            elif found.key != encoded:
                yield self.finding(f"{part}: repeated key", encoded.hex(), found.key.hex())
            elif found.entries != block:
                yield self.finding(part, f"what {entry.algorithm} gives", "something else")

    def _entry(self, word: int, slots: list[SlotRecord]) -> Entry:
        """The entry as far as its shares and its table follow from it."""
        backends = tuple(
            Backend(unpack_address(slot.address), slot.port, weight=slot.weight) for slot in slots
        )
        frontend_type = FRONTEND_TYPES[0]
        return Entry("", (), frontend_type, FrontendFlag(0), 0, word_algorithm(word), backends)


def _grouped(entries: Iterable[tuple[SlotKey, V]]) -> dict[tuple[int, int], dict[int, V]]:
    found: defaultdict[tuple[int, int], dict[int, V]] = defaultdict(dict)
    for key, value in entries:
        found[key.frontend, key.generation][key.position] = value
    return found


def _text(backend: tuple[str, int, int]) -> str:
    name, weight, state = backend
    return f"{name} weight {weight} {STATES[state] if state < len(STATES) else state}"
