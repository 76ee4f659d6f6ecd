"""Whether the maps have room for a plan, found out before anything is written."""

from collections.abc import Iterable, Mapping

import msgspec

from sockhop.agent.plan import Installed, Plan
from sockhop.agent.target import Entry
from sockhop.datapath.records import BLOCK_ENTRIES
from sockhop.datapath.shares import table_for
from sockhop.errors import SystemLackError

__all__ = ["CapacityError", "MapNeed", "blocks_of", "check_capacity", "map_needs"]


class CapacityError(SystemLackError):
    """A map has no room for a plan. Nothing was written."""


class MapNeed(msgspec.Struct, frozen=True):
    """Entries of a map: in use now, needed at most while a plan is applied, and its size."""

    map: str
    used: int
    needed: int
    size: int


def map_needs(plan: Plan, have: Installed, sizes: Mapping[str, int]) -> list[MapNeed]:
    """Return what *plan*, made against *have*, needs of each map that fills up.

    *sizes*: entries that each map has room for, by name.
    """
    names = {entry.service for entry in plan.added.values()} - have.services.keys()
    entries = [old.entry for old in have.entries.values()]
    changed = [*plan.added.values(), *plan.flipped.values()]
    slots, tables, cgroups = _slots(entries), _blocks(entries), _cgroups(entries)
    # Until the grace period is over, old and new stand side by side.
    needs = (
        ("frontends", len(entries), len(have.entries.keys() | plan.added.keys())),
        ("words", len(entries), len(entries) + len(plan.added)),
        ("slots", slots, slots + _slots(changed)),
        ("tables", tables, tables + _blocks(changed)),
        ("backends", len(have.members), len(have.members.keys() | plan.members.keys())),
        ("services", len(have.services), len(have.services) + len(names)),
        ("clients", cgroups, cgroups + _cgroups(plan.added.values())),
    )
    return [MapNeed(name, used, needed, sizes[name]) for name, used, needed in needs]


def check_capacity(plan: Plan, have: Installed, sizes: Mapping[str, int]) -> None:
    """Raise CapacityError where a map has no room for *plan*: see :func:`map_needs`."""
    for need in map_needs(plan, have, sizes):
        if need.needed > need.size:
            raise CapacityError(
                f"the map {need.map} has room for {need.size:,} entries, "
                f"this change needs {need.needed:,}",
                hint="nothing was changed; a larger size is set by `sockhop detach` and then "
                f"`sockhop agent --map-size {_sized(need.map)}={need.needed}`",
            )


def blocks_of(entry: Entry) -> int:
    """Return how many blocks the table of *entry* has."""
    return -(-len(table_for(*entry.choice)) // BLOCK_ENTRIES)


def _cgroups(entries: Iterable[Entry]) -> int:
    return sum(len(entry.cgroups) for entry in entries)


def _slots(entries: Iterable[Entry]) -> int:
    return sum(len(entry.backends) for entry in entries)


def _blocks(entries: Iterable[Entry]) -> int:
    return sum(map(blocks_of, entries))


def _sized(name: str) -> str:
    """The map that `--map-size` names for this one."""
    return "frontends" if name == "words" else name
