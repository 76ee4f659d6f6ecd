"""The ways between the network namespaces of a node: routes, veth pairs, bridges."""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import msgspec

from sockhop.kernel.interfaces import Interface, interfaces_here, namespace_number
from sockhop.kernel.namespaces import Namespace, NamespaceGone, entered, mounted_names
from sockhop.kernel.procfs import command_of
from sockhop.kernel.routes import Route, Routes
from sockhop.model import unpack_address

__all__ = ["Topology", "Way", "name_of"]

_FAR = 4
"""So many namespaces a way is followed through."""


class Way(msgspec.Struct, frozen=True):
    """The way from an origin to the target: the interface that it leaves by, and what is behind.

    `peer`: the other end of a veth, and `owner` its namespace (inode), if that has the address;
    "" and 0 if not.
    """

    origin: str
    interface: str
    kind: str
    mtu: int
    source: str
    gateway: str
    local: bool
    peer: str = ""
    owner: int = 0

    def __str__(self) -> str:
        if self.local:
            return f"{self.origin} has the address itself"
        link = f"{self.interface} ({f'{self.kind}, ' if self.kind else ''}mtu {self.mtu:,})"
        via = f" to the gateway {self.gateway}" if self.gateway else ""
        end = f", whose other end is {self.peer} of network namespace {self.owner}"
        return f"{self.origin} ({self.source}) sends by {link}{via}{end if self.owner else ''}"


class Topology:
    """What *places* send to a packed *address*, and where that goes."""

    def __init__(self, places: Sequence[Namespace], address: bytes) -> None:
        self._places: dict[int, Namespace] = {}
        self._links: dict[int, dict[int, Interface]] = {}
        self._routes: dict[int, Route | None] = {}
        for each in places:
            with suppress(NamespaceGone, OSError), entered(each), Routes() as routes:
                self._routes[each.inode] = routes.find(address)
                self._links[each.inode] = interfaces_here()
                self._places[each.inode] = each

    def owners(self) -> list[Namespace]:
        """Return the namespaces that have the address."""
        return [self._places[inode] for inode in self._owners()]

    def sources(self) -> list[Namespace]:
        """Return the other namespaces from which veth pairs and bridges lead to the address.

        Where no namespace of this node has it, all that have a route: nobody knows more.
        """
        owners = self._owners()
        leads = self._leads if owners else self._routes.get
        return [
            each for inode, each in self._places.items() if inode not in owners and leads(inode)
        ]

    def way(self, name: str, place: Namespace) -> Way | None:
        """Return the way from *place*, called *name*; None if there is none."""
        route = self._routes.get(place.inode)
        link = self._links[place.inode].get(route.interface) if route else None
        if route is None or link is None:
            return None
        there, peer = self._behind(place.inode, link)
        ends = peer is not None and there in self._owners()
        return Way(
            *(name, link.name, link.kind, link.mtu),
            unpack_address(route.source),
            unpack_address(route.gateway) if route.gateway else "",
            route.local,
            peer.name if ends and peer else "",
            there if ends else 0,
        )

    def _owners(self) -> list[int]:
        return [inode for inode, route in self._routes.items() if route and route.local]

    def _leads(self, place: int, depth: int = _FAR) -> bool:
        route = self._routes.get(place)
        if route is None or not depth:
            return False
        link = self._links[place].get(route.interface)
        if route.local or link is None:
            return route.local
        if link.kind == "bridge":
            return self._bridged(place, link.number)
        there, peer = self._behind(place, link)
        if peer is None:
            return False
        return self._bridged(there, peer.master) or self._leads(there, depth - 1)

    def _bridged(self, place: int, bridge: int) -> bool:
        """Whether a port of a bridge leads to a namespace that has the address."""
        ports = [each for each in self._links[place].values() if bridge and each.master == bridge]
        owners = self._owners()
        return any(self._behind(place, each)[0] in owners for each in ports)

    def _behind(self, place: int, link: Interface) -> tuple[int, Interface | None]:
        """Return where the other end of a veth is, and that end; 0 and None if not found."""
        if link.kind != "veth" or link.peer_namespace is None:
            return 0, None
        for inode, links in self._links.items():
            other = links.get(link.peer)
            # Indexes are used again in every namespace.
            if (
                other
                and (other.kind, other.peer) == ("veth", link.number)
                and self._number(place, inode) == link.peer_namespace
            ):
                return inode, other
        return 0, None

    def _number(self, place: int, other: int) -> int:
        """Return by which number one namespace knows another; -1 if it does not."""
        # Opened first: a path may be that of this thread's own namespace.
        with (
            suppress(NamespaceGone, OSError),
            self._places[other].path.open("rb") as target,
            entered(self._places[place]),
        ):
            return namespace_number(target.fileno())
        return -1


def name_of(place: Namespace) -> str:
    """Return what people call a namespace: its name, else a process in it, else its inode."""
    with suppress(OSError):
        if place.inode == Path("/proc/1/ns/net").stat().st_ino:
            return "the node"
    name = mounted_names().get(place.inode, "")
    with suppress(OSError):
        process = place.path.parent.parent
        if not name and process.parent == Path("/proc") and process.name.isdecimal():
            name = f"{command_of(int(process.name))}/{process.name}"
    return name or str(place.inode)
