"""Reads back what the pinned maps hold: what the hooks would do, not what anybody meant."""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping

from sockhop.agent.plan import Installed, InstalledEntry, InstalledMember
from sockhop.agent.target import Cgroups, Entry, Member
from sockhop.datapath.balancer import BalanceMaps
from sockhop.datapath.records import (
    BLOCK_ENTRIES,
    FRONTEND_TYPES,
    STATES,
    Client,
    FrontendFlag,
    FrontendRecord,
    SlotKey,
    SlotRecord,
    word_algorithm,
    word_count,
    word_generation,
)
from sockhop.model import Algorithm, Backend, Protocol, unpack_address

__all__ = ["map_usage", "read_installed", "read_members", "read_services"]

_PROTOCOLS = {protocol.number: protocol for protocol in Protocol}


def read_services(maps: BalanceMaps) -> dict[int, str]:
    """Return the names of the service ports by their ids."""
    return {number: _text(record.name) for number, record in maps.services.items()}


def read_members(maps: BalanceMaps, names: Mapping[int, str]) -> dict[Member, InstalledMember]:
    """Return the backends of the services in *names*."""
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
    return members


def read_installed(maps: BalanceMaps) -> Installed:
    """Return all that the maps hold.

    An entry that is damaged (a slot or a table's block is missing, or names a backend that is not
    there) belongs to no service, so that a plan makes it anew.
    """
    names = read_services(maps)
    members = read_members(maps, names)
    known = {member.id for member in members.values()}
    slots: defaultdict[tuple[int, int], list[tuple[SlotKey, SlotRecord]]] = defaultdict(list)
    for key, slot in maps.slots.items():
        slots[key.frontend, key.generation].append((key, slot))
    blocks = Counter((key.frontend, key.generation) for key in maps.tables.keys())
    cgroups: defaultdict[int, list[tuple[int, Client]]] = defaultdict(list)
    for client, said in maps.clients.items():
        cgroups[client.frontend].append((client.cgroup, Client(said)))
    frontends = maps.frontends.items()
    words = maps.words.get_many(label.id for _, label in frontends)
    entries = {}
    for frontend, label in frontends:
        word = words.get(label.id, 0)
        here = (label.id, word_generation(word))
        found = sorted(slots.get(here, ()))
        sound = _is_sound(word, found, blocks[here], known)
        name = names.get(label.service, "") if sound else ""
        identity = name, tuple(sorted(cgroups[label.id]))
        entries[frontend] = _entry(label, identity, word, [slot for _, slot in found])
    return Installed(entries, members, {name: number for number, name in names.items()})


def _is_sound(
    word: int, slots: list[tuple[SlotKey, SlotRecord]], blocks: int, known: set[int]
) -> bool:
    """Whether a reader of *word* finds all that it may ask for."""
    count = word_count(word)
    if word_algorithm(word) in (Algorithm.ROUND_ROBIN, Algorithm.MAGLEV):
        complete = blocks == -(-count // BLOCK_ENTRIES) and bool(slots) == bool(count)
    else:
        complete = len(slots) == count
    return complete and all(
        key.position == position and slot.backend in known
        for position, (key, slot) in enumerate(slots)
    )


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
    record: FrontendRecord, identity: tuple[str, Cgroups], word: int, slots: list[SlotRecord]
) -> InstalledEntry:
    entry = Entry(
        *identity,
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
