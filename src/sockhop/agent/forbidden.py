"""Live sockets that are where policies or redirects would not have let them go.

Found in every network namespace, whenever they were made: what counts is the cgroup in which they
were made, and where they are connected to now.
"""

import socket
from collections.abc import Collection, Iterable, Set
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from sockhop.agent.policy_table import Judge, PolicyTable
from sockhop.datapath.accepted import LISTENING, Accepted, covered
from sockhop.datapath.balancer import BalanceMaps
from sockhop.datapath.listing import Listing, list_here
from sockhop.datapath.records import FrontendKey, Layer
from sockhop.datapath.sockets import CONNECTED, Socket
from sockhop.kernel.cgroups import cgroup_id, cgroup_root, groups_below
from sockhop.kernel.namespaces import NamespaceGone, Namespaces, entered
from sockhop.kernel.sockfilter import any_network

__all__ = ["Forbidden", "Looker", "Scene", "forbidden", "misplaced"]


class Forbidden(NamedTuple):
    """A socket, and the policy that forbids where it is connected to."""

    socket: Socket
    policy: str


class Placed(NamedTuple):
    """A socket that hooks meet: its netns cookie, and its cgroup and those above it, by id."""

    socket: Socket
    netns: int
    cgroups: tuple[int, ...]


class Scene(NamedTuple):
    """Connected sockets at a time, those that may be forbidden or misplaced.

    `unknown` counts those whose cgroup is gone, or is not told (before Linux 5.8). Nobody can say
    what is meant for them, so they are left alone.
    """

    placed: list[Placed]
    unknown: int


class Looker:
    """Looks at the sockets made in a cgroup, or below it. Use as a context manager."""

    def __init__(self, listing: Listing, top: Path, namespaces: Namespaces | None = None) -> None:
        """*top*: the cgroup where the hooks are attached: others' sockets meet no policy.

        *namespaces*: of whoever is to enter those where sockets are found, who need not look anew.
        """
        self._listing = listing
        self._top = top
        self._accepted = Accepted()
        self._namespaces = namespaces or Namespaces()

    def close(self) -> None:
        """Unload the program that is used."""
        self._accepted.close()

    def __enter__(self) -> "Looker":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def look(
        self,
        table: PolicyTable,
        frontends: Collection[tuple[bytes, int]],
        *,
        balanced: bool,
        quick: bool = False,
    ) -> Scene:
        """Return the sockets that can be ended, see Socket.reason_to_leave, of those connected.

        Only those to where *table* denies something to somebody, or to one of *frontends*; and with
        *balanced* those that are. *quick*: in the namespaces that are found at once, see
        Namespaces.all().
        """
        spaces = {each.inode: each for each in self._namespaces.all(quick=quick)}
        code = _code(table, frontends)
        found: dict[int, Socket] = {}
        for space in spaces.values() if code is not None else ():
            with suppress(NamespaceGone), entered(space):
                found |= {each.cookie: each for each in list_here(states=CONNECTED, where=code)}
        lineage, top = _lineage(), cgroup_id(self._top)
        mine = [each for each in found.values() if top in lineage.get(each.cgroup, ())]
        known = {each.cookie: each for each in self._listing.with_origins(mine)} if mine else {}
        if balanced:
            known |= {each.cookie: each for each in self._listing.remembered()}
        placed = [
            Placed(each, spaces[each.netns].cookie, lineage[each.cgroup])
            for each in known.values()
            if each.cgroup in lineage and each.netns in spaces and not each.reason_to_leave
        ]
        unknown = sum(1 for each in found.values() if each.cgroup not in lineage)
        return Scene(placed, unknown)

    def dialled(self, sockets: Iterable[Socket]) -> set[int]:
        """Return the cookies of those of *sockets* that did not come out of accept()."""
        sockets = list(sockets)
        tcp = {each.netns for each in sockets if each.protocol == socket.IPPROTO_TCP}
        places = self._namespaces.by_inode(tcp) if tcp else []
        accepted: set[int] = set()
        listening: list[Socket] = []
        for place in places:
            with suppress(NamespaceGone), entered(place):
                accepted |= self._accepted.here()
                listening += list_here((socket.IPPROTO_TCP,), states=LISTENING)
        accepted |= covered(sockets, listening)
        return {each.cookie for each in sockets} - accepted


def forbidden(scene: Scene, table: PolicyTable) -> list[Forbidden]:
    """Return the sockets to which *table* denies what they are connected to, dialled or not."""
    judge = Judge(table)
    found = []
    for each in scene.placed:
        to = each.socket.remote_address, each.socket.protocol, each.socket.remote_port
        verdict = judge.decide(each.netns, each.cgroups, *to)
        if verdict.denied:
            found.append(Forbidden(each.socket, verdict.policy))
    return found


def misplaced(scene: Scene, maps: BalanceMaps, redirects: Set[int]) -> list[Socket]:
    """Return the sockets that a redirect would serve now, or served and does no more.

    *redirects*: the ids of the services that stand for redirects, or stood for one.
    """
    return [each.socket for each in scene.placed if _is_misplaced(each, maps, redirects)]


def _is_misplaced(each: Placed, maps: BalanceMaps, redirects: Set[int]) -> bool:
    pair, origin = each.socket.pair, each.socket.origin
    dialled = each.socket.remote_address, each.socket.remote_port
    if pair and origin:
        dialled = origin.frontend_address, origin.frontend_port
    key = FrontendKey(dialled[0], 0, dialled[1], each.socket.protocol)
    found = maps.find_for(key, each.netns, each.cgroups)
    if found and found[0].layer == Layer.REDIRECTS:
        return pair is None or pair.service != found[1].service or _is_gone(pair.backend, maps)
    return pair is not None and pair.service in redirects


def _is_gone(backend: int, maps: BalanceMaps) -> bool:
    return maps.backends.get(backend) is None


def _code(table: PolicyTable, frontends: Collection[tuple[bytes, int]]) -> bytes | None:
    """Return bytecode for the sockets that are worth a look; None where there are none."""
    networks = {(*network, -1) for network in table.denying()}
    networks |= {(address, 128, port) for address, port in frontends}
    if not networks:
        return None
    everything = any(length in (0, 96) for _, length, _ in networks)
    return b"" if everything else any_network(sorted(networks))


def _lineage() -> dict[int, tuple[int, ...]]:
    """Return of each cgroup, by its id, the ids of itself and those above it."""
    ids: dict[Path, int] = {}
    for path, _ in groups_below(cgroup_root()):
        with suppress(OSError):
            ids[path] = path.stat().st_ino
    return {
        number: tuple(ids[each] for each in chain((path,), path.parents) if each in ids)
        for path, number in ids.items()
    }
