"""Reads back what the pinned maps hold: what the hooks would do, not what anybody meant."""

from collections import defaultdict
from collections.abc import Iterator

from sockhop.agent.plan import Installed, InstalledEntry, InstalledMember
from sockhop.agent.target import Entry, Member
from sockhop.datapath.balancer import BalanceMaps
from sockhop.datapath.records import (
    BLOCK_ENTRIES,
    FRONTEND_TYPES,
    STATES,
    FrontendFlag,
    FrontendKey,
    FrontendRecord,
    SlotKey,
    SlotRecord,
    word_algorithm,
    word_count,
    word_generation,
)
from sockhop.model import Backend, Protocol, unpack_address

__all__ = ["map_usage", "read_entry", "read_installed", "read_table"]

_PROTOCOLS = {protocol.number: protocol for protocol in Protocol}


def read_installed(maps: BalanceMaps) -> Installed:
    """Return all that the maps hold."""
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
    slots: defaultdict[tuple[int, int], list[tuple[SlotKey, SlotRecord]]] = defaultdict(list)
    for key, slot in maps.slots.items():
        slots[key.frontend, key.generation].append((key, slot))
    words = dict(maps.words.items())
    entries = {}
    for frontend, record in maps.frontends.items():
        word = words[record.id]
        found = sorted(slots.get((record.id, word_generation(word)), ()))
        name = names.get(record.service, "")
        entries[frontend] = _entry(record, name, word, [slot for _, slot in found])
    return Installed(entries, members, {name: number for number, name in names.items()})


def read_entry(maps: BalanceMaps, key: FrontendKey) -> InstalledEntry | None:
    """Return what the maps hold for one frontend; None if it is not there."""
    record = maps.frontends.get(key)
    if record is None:
        return None
    word = maps.words.get(record.id) or 0
    service = maps.services.get(record.service)
    slots: list[SlotRecord] = []
    while slot := maps.slots.get(SlotKey(record.id, word_generation(word), len(slots))):
        slots.append(slot)
    return _entry(record, _text(service.name) if service else "", word, slots)


def read_table(maps: BalanceMaps, entry: InstalledEntry) -> bytes:
    """Return the entries of the table of an installed entry, as far as its blocks are there."""
    found, blocks = b"", -(-word_count(maps.words.get(entry.id) or 0) // BLOCK_ENTRIES)
    for number in range(blocks):
        block = maps.tables.get(SlotKey(entry.id, entry.generation, number))
        found += block.entries if block else b""
    return found


def map_usage(maps: BalanceMaps) -> Iterator[tuple[str, int, int]]:
    """Yield each map that fills up: its name, its entries, and how many it has room for."""
    for counted in (
        maps.frontends,
        maps.slots,
        maps.tables,
        maps.backends,
        maps.services,
        maps.live,
    ):
        yield counted.name, counted.used(), counted.max_entries


def _text(name: bytes) -> str:
    return name.rstrip(b"\0").decode(errors="replace")


def _entry(
    record: FrontendRecord, service: str, word: int, slots: list[SlotRecord]
) -> InstalledEntry:
    entry = Entry(
        service,
        FRONTEND_TYPES[record.type],
        FrontendFlag(record.flags),
        record.affinity,
        word_algorithm(word),
        tuple(
            Backend(unpack_address(slot.address), slot.port, STATES[slot.state], slot.weight)
            for slot in slots
        ),
    )
    return InstalledEntry(entry, record.id, word_generation(word))
