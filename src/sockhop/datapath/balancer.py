"""The balance programs and the pinned maps that they share with the agent."""

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from sockhop.datapath.attachment import (
    Owner,
    attach_hooks,
    cgroup_of_links,
    check_hooks,
    detach_hooks,
    programs_in_force,
)
from sockhop.datapath.neighbours import Neighbourhood, find_neighbours
from sockhop.datapath.pins import (
    NotInstalled,
    OtherVersion,
    check_version,
    link_directory,
    map_directory,
    nothing_here,
)
from sockhop.datapath.policies import PolicyMaps
from sockhop.datapath.records import (
    ABI,
    BackendRecord,
    Client,
    ClientKey,
    Counters,
    FrontendFlag,
    FrontendKey,
    FrontendRecord,
    Layer,
    LiveKey,
    Move,
    ServiceRecord,
    Setting,
    SlotKey,
    SlotRecord,
    TableBlock,
    Total,
    Watch,
)
from sockhop.kernel.btf import Codec, Layouts
from sockhop.kernel.cgroups import AttachType
from sockhop.kernel.links import detach, unpin
from sockhop.kernel.maps import U32, U64, Map, open_pinned
from sockhop.kernel.objects import BpfObject, object_path

__all__ = [
    "HOOKS",
    "SIZED_MAPS",
    "BalanceMaps",
    "Balancer",
    "NotInstalled",
    "OtherVersion",
    "attached_hooks",
    "balanced_cgroup",
    "check_room",
    "check_version",
    "link_directory",
    "map_directory",
    "remove_pins",
    "survey",
]

# Reverse translation is attached first and detached last, so that no balanced socket is
# without it: several links are not one atomic update.
HOOKS = (
    AttachType.SOCK_RELEASE,
    AttachType.GETPEERNAME4,
    AttachType.GETPEERNAME6,
    AttachType.RECVMSG4,
    AttachType.RECVMSG6,
    AttachType.POST_BIND4,
    AttachType.POST_BIND6,
    AttachType.BIND4,
    AttachType.BIND6,
    AttachType.SENDMSG4,
    AttachType.SENDMSG6,
    AttachType.CONNECT4,
    AttachType.CONNECT6,
)


# Maps whose size can be chosen, with those that go with them.
SIZED_MAPS = {
    "frontends": ("words", "counters"),
    "slots": (),
    "tables": (),
    "backends": ("loads",),
    "services": (),
    "clients": (),
    "live": (),
    "affinities": (),
    "datagram_overflow": (),
    "policies": (),
    "policy_clients": (),
    "policy_networks": (),
    "policy_ports": (),
    "provenance_by_cookie": (),
}


class BalanceMaps:
    """The pinned maps, typed. They can be read whether or not an agent runs."""

    def __init__(self, pins: Path) -> None:
        """Open the maps below the bpffs directory *pins*; NotInstalled where there are none."""
        layouts = Layouts(object_path("balance"))
        self.pins = pins
        """The bpffs directory."""
        self._stack = ExitStack()
        self.frontend_key: Codec[FrontendKey] = layouts.codec(FrontendKey, "frontend_key")
        self.slot_key: Codec[SlotKey] = layouts.codec(SlotKey, "slot_key")
        try:
            check_version(pins)
            self.settings = self._open("settings", U32, U64)
            self.frontends = self._open(
                "frontends", self.frontend_key, layouts.codec(FrontendRecord, "frontend")
            )
            self.clients = self._open("clients", layouts.codec(ClientKey, "client_key"), U32)
            self.words = self._open("words", U32, U64)
            self.slots = self._open("slots", self.slot_key, layouts.codec(SlotRecord, "slot"))
            self.tables = self._open(
                "tables", self.slot_key, layouts.codec(TableBlock, "table_block")
            )
            self.backends = self._open("backends", U32, layouts.codec(BackendRecord, "backend"))
            self.services = self._open("services", U32, layouts.codec(ServiceRecord, "service"))
            self.counters = self._open("counters", U32, layouts.codec(Counters, "counters"))
            self.totals = self._open("totals", U32, U64)
            self.loads = self._open("loads", U32, U64)
            self.live = self._open("live", layouts.codec(LiveKey, "live_key"), U64)
            self.moves = self._open("moves", U64, layouts.codec(Move, "move"))
            self.watched = self._open("watched", U64, layouts.codec(Watch, "watch"))
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the descriptors; the maps stay pinned."""
        self._stack.close()

    def __enter__(self) -> "BalanceMaps":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def setting(self, which: Setting) -> int:
        """Return a value of the map `settings`."""
        return self.settings.get(which) or 0

    def events(self) -> dict[Total, int]:
        """Return how often the rare things of the map `totals` have happened."""
        counts = dict(self.totals.items())
        return {each: counts[each] for each in Total}

    def index_is_whole(self) -> bool:
        """Whether the live index has all sockets: it never lacked room, or they are gone since."""
        return (self.totals.get(Total.LIVE_FULL) or 0) <= self.setting(Setting.WHOLE)

    def find_frontend(
        self, key: FrontendKey, netns_cookie: int
    ) -> tuple[FrontendKey, FrontendRecord] | None:
        """Return what a hook finds at *key*, whose netns is 0, for a socket of that namespace."""
        general: FrontendRecord | None = self.frontends.get(key)
        if general is None or not general.flags & FrontendFlag.SCOPED:
            return general and (key, general)
        scoped_key = key._replace(netns=netns_cookie)
        if scoped := self.frontends.get(scoped_key):
            return scoped_key, scoped
        return None if general.flags & FrontendFlag.ABSENT else (key, general)

    def find_for(
        self, key: FrontendKey, netns_cookie: int, cgroups: Iterable[int]
    ) -> tuple[FrontendKey, FrontendRecord] | None:
        """Return what a hook finds at *key*, a redirect first if there is one for the socket.

        *cgroups*: the ids of the one in which it was made and of those above, in this order.
        """
        if self.setting(Setting.REDIRECTS):
            found = self.find_frontend(key._replace(layer=Layer.REDIRECTS), netns_cookie)
            if found and self._serves(found[1], cgroups):
                return found
        return self.find_frontend(key, netns_cookie)

    def _serves(self, frontend: FrontendRecord, cgroups: Iterable[int]) -> bool:
        if frontend.flags & FrontendFlag.CLIENTS:
            for cgroup in cgroups:
                if said := self.clients.get(ClientKey(cgroup, frontend.id)):
                    return bool(said == Client.SERVED)
        return not frontend.flags & FrontendFlag.LISTED_ONLY

    def sizes(self) -> dict[str, int]:
        """Return how many entries each map that a plan fills has room for, by its name."""
        filled: tuple[Map[Any, Any], ...] = (
            self.frontends,
            self.words,
            self.slots,
            self.tables,
            self.backends,
            self.services,
            self.clients,
        )
        return {each.name: each.max_entries for each in filled}

    def _open(self, name: str, key: Codec[Any], value: Codec[Any]) -> Any:
        try:
            fd = open_pinned(map_directory(self.pins) / name)
        except FileNotFoundError:
            raise nothing_here(self.pins) from None
        return self._stack.enter_context(Map(fd, key, value))


class Balancer:
    """The loaded balance programs. Closing it leaves attached programs and pinned maps in force."""

    def __init__(
        self, pins: Path, *, path: Path | None = None, sizes: Mapping[str, int] | None = None
    ) -> None:
        """Load the programs, making or reusing the maps pinned below *pins* (bpffs, locked).

        *path*: another object file than the package's; *sizes*: entries by name of SIZED_MAPS.
        OtherVersion where the maps are those of a version whose maps differ.
        """
        check_version(pins)
        self._pins = pins
        for directory in (map_directory(pins), link_directory(pins)):
            directory.mkdir(mode=0o700, exist_ok=True)
        self._object = BpfObject(
            path or object_path("balance"),
            pins=map_directory(pins),
            max_entries={
                name: entries
                for sized, entries in (sizes or {}).items()
                for name in (sized, *SIZED_MAPS[sized])
            },
        )
        with ExitStack() as stack:
            stack.callback(self._object.close)
            self.maps = stack.enter_context(BalanceMaps(pins))
            self.policies = stack.enter_context(PolicyMaps(pins))
            self._stack = stack.pop_all()
        self.maps.settings.set(Setting.ABI, ABI)

    def close(self) -> None:
        """Close descriptors."""
        self._stack.close()

    def __enter__(self) -> "Balancer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def attach(self, cgroup: int) -> None:
        """Attach every hook to the cgroup, or let what is attached run these programs.

        All or none: see :func:`sockhop.datapath.attachment.attach_hooks`.
        """
        programs = {hook: self._object.program(f"sockhop_{hook.hook}") for hook in HOOKS}
        owner = Owner(map_directory(self._pins))
        attach_hooks(programs, cgroup, link_directory(self._pins), owner)


def attached_hooks(pins: Path, cgroup: Path | None = None) -> dict[AttachType, int]:
    """Return which hooks run a program of ours, with its id.

    Without *cgroup* only those that have a link: a program that was attached without one
    is known by its cgroup alone.
    """
    return programs_in_force(HOOKS, link_directory(pins), Owner(map_directory(pins)), cgroup)


def balanced_cgroup(pins: Path) -> Path | None:
    """Return the cgroup that the links are attached to; None where there are none.

    None also where it is gone, or its path cannot be told without CAP_DAC_READ_SEARCH.
    """
    return cgroup_of_links(HOOKS, link_directory(pins))


def check_room(pins: Path, cgroup: int) -> None:
    """Raise SystemLackError where it shows beforehand that a hook cannot be attached."""
    check_hooks(HOOKS, cgroup, link_directory(pins), Owner(map_directory(pins)))


def survey(pins: Path, cgroup: Path) -> Neighbourhood:
    """Find the programs of others at our hooks, on *cgroup*, above and below."""
    ours = attached_hooks(pins, cgroup)
    return find_neighbours(cgroup, HOOKS, ours, Owner(map_directory(pins)))


def remove_pins(pins: Path, cgroup: Path | None = None) -> None:
    """End balancing: detach, forward hooks first, then unpin the maps and remove the directories.

    Programs of ours that were attached without a link are looked for in the whole hierarchy,
    and where that is another at *cgroup* and below.
    """
    links, maps = link_directory(pins), map_directory(pins)
    detach_hooks(reversed(HOOKS), links, Owner(maps), cgroup)
    for directory, remove in ((links, detach), (maps, unpin)):
        if directory.is_dir():
            for pin in sorted(directory.iterdir()):  # links: of hooks that this version lacks
                remove(pin)
            directory.rmdir()
    if pins.is_dir() and not any(pins.iterdir()):
        pins.rmdir()
