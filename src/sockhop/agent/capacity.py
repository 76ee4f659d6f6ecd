"""Whether the maps have room for a plan, found out before anything is written."""

import operator
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import msgspec

from sockhop.agent.plan import Installed, Plan
from sockhop.agent.target import Entry
from sockhop.datapath.records import BLOCK_ENTRIES
from sockhop.datapath.shares import table_for
from sockhop.errors import SystemLackError

__all__ = ["CapacityError", "MapNeed", "Usage", "blocks_of", "check_capacity", "map_needs"]


class CapacityError(SystemLackError):
    """A map has no room for a plan. Nothing was written."""


class MapNeed(msgspec.Struct, frozen=True):
    """Entries of a map: in use now, needed at most while a plan is applied, and its size."""

    map: str
    used: int
    needed: int
    size: int


class Usage(NamedTuple):
    """Entries in the maps that have several, or none, of a frontend."""

    slots: int
    tables: int
    clients: int

    @classmethod
    def of(cls, entries: Iterable[Entry]) -> "Usage":
        """Return what *entries* take."""
        sizes = [(len(e.backends), blocks_of(e), len(e.cgroups)) for e in entries]
        return cls(*map(sum, zip(*sizes, strict=True))) if sizes else cls(0, 0, 0)

    def plus(self, other: "Usage") -> "Usage":
        """Return both together."""
        return Usage(*map(operator.add, self, other))

    def minus(self, other: "Usage") -> "Usage":
        """Return what is left without *other*."""
        return Usage(*map(operator.sub, self, other))


def map_needs(plan: Plan, have: Installed, usage: Usage, sizes: Mapping[str, int]) -> list[MapNeed]:
    """Return what *plan*, made against *have*, needs of each map that fills up.

    *usage*: what *have* takes; *sizes*: entries that each map has room for, by name.
    """
    names = {entry.service for entry in plan.added.values()} - have.services.keys()
    keys, members = (
        len(have.entries) + sum(key not in have.entries for key in plan.added),
        len(have.members) + sum(member not in have.members for member in plan.members),
    )
    # Until the grace period is over, old and new stand side by side.
    most = usage.plus(Usage.of((*plan.added.values(), *plan.flipped.values())))
    needs = (
        ("frontends", len(have.entries), keys),
        ("words", len(have.entries), len(have.entries) + len(plan.added)),
        ("slots", usage.slots, most.slots),
        ("tables", usage.tables, most.tables),
        ("backends", len(have.members), members),
        ("services", len(have.services), len(have.services) + len(names)),
        ("clients", usage.clients, most.clients),
    )
    return [MapNeed(name, used, needed, sizes[name]) for name, used, needed in needs]


def check_capacity(needs: Iterable[MapNeed]) -> None:
    """Raise CapacityError where a map has less room than is needed: see :func:`map_needs`."""
    for need in needs:
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


def _sized(name: str) -> str:
    """The map that `--map-size` names for this one."""
    return "frontends" if name == "words" else name
