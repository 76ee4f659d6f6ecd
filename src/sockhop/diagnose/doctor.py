"""Tells why connections to an address fail or hang: dials, looks where they hang, concludes."""

import os
import socket
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from enum import StrEnum
from pathlib import Path
from typing import NamedTuple

import msgspec

from sockhop.datapath.balancer import BalanceMaps, NotInstalled
from sockhop.datapath.listing import list_here
from sockhop.datapath.records import BackendRecord, FrontendKey
from sockhop.datapath.sockets import TCP_STATES, Socket
from sockhop.diagnose.dial import Attempt, Result, dialled
from sockhop.diagnose.pairs import HalfSpliced, examine, match_pairs, unread_from_stack
from sockhop.diagnose.records import AuditFlag
from sockhop.diagnose.visit import End, Visitor, open_sockmaps
from sockhop.errors import SystemLackError
from sockhop.kernel.namespaces import Namespace, NamespaceGone, Namespaces, entered
from sockhop.kernel.procfs import find_holders
from sockhop.kernel.routes import Routes
from sockhop.model import endpoint, is_loopback, unpack_address

__all__ = ["Cause", "Conclusion", "Diagnosis", "Dialling", "diagnose"]

Target = tuple[bytes, int]

_LISTEN = 1 << TCP_STATES.index("LISTEN") + 1
_STOPPED = ("T", "t")


class Cause(StrEnum):
    """What can be wrong."""

    NOT_LISTENING = "server not listening"
    NOT_ACCEPTING = "server not accepting"
    NOT_ANSWERING = "server accepts and does not answer"
    FILTERED = "filtered on the way"
    STALE_ENTRY = "stale sockmap entry"
    HALF_SPLICED = "half-spliced pair"
    NO_BACKEND = "no backend"
    BACKEND_GONE = "backend that is gone"
    DENIED = "policy denial"
    MTU = "MTU black hole"
    NO_ROUTE = "no route"
    NO_PORT = "no free local port"


class Conclusion(msgspec.Struct, frozen=True):
    """A cause, where it was seen from, what shows it, and what to do."""

    cause: Cause
    origin: str
    because: str
    advice: str


class Dialling(msgspec.Struct, frozen=True):
    """What came of dialling from one place: how many attempts ended how."""

    origin: str
    attempts: int
    failed: int
    results: dict[Result, int]

    @property
    def percent(self) -> int:
        """How many of 100 fail."""
        return round(100 * self.failed / self.attempts)


class Diagnosis(msgspec.Struct, frozen=True):
    """The answer for a target. `owners`: the namespaces (inodes) that have its address, none if it
    is a `loopback` one, which every namespace has."""

    target: str
    loopback: bool
    owners: list[int]
    dialled: list[Dialling]
    conclusions: list[Conclusion]


class Origin(NamedTuple):
    """A place to dial from, and how people call it."""

    name: str
    place: Namespace | None


class _Found(NamedTuple):
    cause: Cause
    because: str
    advice: str


def diagnose(
    target: Target,
    origins: Sequence[Origin],
    pins: Path,
    *,
    request: bytes = b"",
    count: int = 5,
    timeout: float = 1,
) -> Diagnosis:
    """Dial *target*, a packed address and a TCP port, *count* times from each of *origins*.

    *request*: what to ask on each connection, b"": only connect; *pins*: the bpffs directory of an
    agent, if one runs. Each kind of failure is looked into once for each origin.
    """
    done: list[Dialling] = []
    conclusions: list[Conclusion] = []
    with Visitor() as visitor:
        doctor = _Doctor(visitor, pins, request, count, timeout)
        for origin in origins:
            with suppress(NamespaceGone):
                dialling, found = doctor.visit(origin, target)
                done.append(dialling)
                conclusions += (Conclusion(each.cause, origin.name, *each[1:]) for each in found)
        owners = sorted({each.inode for each in doctor.owners(target)})
    address = unpack_address(target[0])
    name = endpoint(address, target[1])
    return Diagnosis(name, is_loopback(address), owners, done, conclusions)


class _Doctor:
    def __init__(
        self, visitor: Visitor, pins: Path, request: bytes, count: int, timeout: float
    ) -> None:
        self._visitor = visitor
        self._pins = pins
        self._request = request
        self._count = count
        self._timeout = timeout
        self._places = Namespaces().all()
        if not self._places:
            raise SystemLackError(
                "no network namespace can be told from another here",
                hint="this needs Linux 5.14 (SO_NETNS_COOKIE), and root",
            )

    def visit(self, origin: Origin, target: Target) -> tuple[Dialling, list[_Found]]:
        found: list[_Found] = []
        with dialled(
            origin.place, target, self._request, count=self._count, timeout=self._timeout
        ) as attempts:
            results = Counter(each.result for each in attempts)
            for result in results:
                first = next(each for each in attempts if each.result is result)
                if not result.is_good:
                    found += self._explain(origin, target, first)
        failed = sum(n for result, n in results.items() if not result.is_good)
        causes = {each.cause: each for each in found}
        return Dialling(origin.name, len(attempts), failed, dict(results)), list(causes.values())

    def owners(self, target: Target, place: Namespace | None = None) -> list[Namespace]:
        """Return the namespaces that have the target's address; a loopback one is *place*'s own."""
        if is_loopback(unpack_address(target[0])):
            return [each for each in self._places if place and each.inode == place.inode]
        found = []
        for each in self._places:
            with suppress(NamespaceGone, OSError), entered(each), Routes() as routes:
                route = routes.find(target[0])
                if route and route.local:
                    found.append(each)
        return found

    # --- one failure --------------------------------------------------------------------------

    def _explain(self, origin: Origin, target: Target, attempt: Attempt) -> list[_Found]:
        backends = self._backends(target)
        if backends is not None:
            if attempt.result is Result.UNREACHABLE:
                return [_NO_BACKEND]
            if attempt.result in (Result.REFUSED, Result.TIMEOUT):
                return self._of_backends(origin, backends)
        if at_once := _AT_ONCE.get(attempt.result):
            return [at_once]
        if attempt.result is Result.UNREACHABLE:
            because = f"connect() fails at once: {os.strerror(attempt.errno)}"
            advice = "look at the routes of this namespace (ip route get)"
            return [_Found(Cause.NO_ROUTE, because, advice)]
        owners = self.owners(target, origin.place or _own_namespace(self._places))
        listeners = self._listeners(owners, target)
        if attempt.result is Result.SILENT:
            return [self._silent(origin, target, attempt, owners, listeners)]
        refused = attempt.result is Result.REFUSED
        return [(_refused if refused else _timed_out)(owners, listeners)]

    def _listeners(self, owners: Sequence[Namespace], target: Target) -> list[Socket]:
        """Return the sockets that listen for connections to the target."""
        address = unpack_address(target[0])
        four = ":" not in address
        wanted = {address, "0.0.0.0"} if four else {address, "::"}
        for_four = {
            each.socket.inode
            for each in (self._visitor.ends(owners) if four else ())
            if not each.socket.flags & AuditFlag.IPV6ONLY
        }
        found = []
        for place in owners:
            with suppress(NamespaceGone), entered(place):
                for each in list_here((socket.IPPROTO_TCP,), states=_LISTEN):
                    local = unpack_address(each.local_address)
                    if each.local_port == target[1] and (
                        local in wanted or (local == "::" and each.inode in for_four)
                    ):
                        found.append(each)
        return found

    def _backends(self, target: Target) -> list[BackendRecord] | None:
        """Return the backends if the target is a frontend of ours; None if it is not."""
        try:
            with BalanceMaps(self._pins) as maps:
                key = FrontendKey(target[0], 0, target[1], socket.IPPROTO_TCP)
                frontend = maps.frontends.get(key)
                if frontend is None:
                    return None
                return [
                    each for _, each in maps.backends.items() if each.service == frontend.service
                ]
        except NotInstalled:
            return None

    def _of_backends(self, origin: Origin, backends: Sequence[BackendRecord]) -> list[_Found]:
        """Dial each backend by itself: those that fail are gone."""
        found = []
        for each in backends:
            target = (each.address, each.port)
            with dialled(origin.place, target, b"", timeout=self._timeout) as (attempt,):
                if attempt.result.is_good:
                    continue
            name = endpoint(unpack_address(each.address), each.port)
            found.append(
                _Found(
                    Cause.BACKEND_GONE,
                    f"the backend {name}, dialled by itself: {attempt.result}",
                    "take it out of the service, or `sockhop backend quarantine` it",
                )
            )
        return found

    def _silent(
        self,
        origin: Origin,
        target: Target,
        attempt: Attempt,
        owners: Sequence[Namespace],
        listeners: Sequence[Socket],
    ) -> _Found:
        """Look at both ends of a connection that hangs."""
        own = attempt.socket.getsockname()[1]
        with ExitStack() as stack:
            places = [*owners, origin.place or _own_namespace(self._places)]
            _, pairs = examine(
                self._visitor, open_sockmaps(stack), wait=0.1, places=list(dict.fromkeys(places))
            )
        for each in pairs.half_spliced:
            ports = {_port(each.victim.local), _port(each.victim.remote)}
            if each.harmful and own in ports:
                return _spliced(each)
        inode = os.fstat(attempt.socket.fileno()).st_ino
        for one, other in match_pairs(self._visitor.ends(dict.fromkeys(places))):
            for here, there in ((one, other), (other, one)):
                if here.socket.inode == inode:
                    return self._of_server(origin, target, here, there, listeners)
        return _not_there(owners, listeners)

    def _of_server(
        self,
        origin: Origin,
        target: Target,
        here: End,
        there: End,
        listeners: Sequence[Socket],
    ) -> _Found:
        server = there.socket
        if not server.inode:
            return _not_accepting(listeners, "the connection waits to be accepted")
        if server.waiting and server.state_name == "ESTAB":
            with dialled(
                origin.place, target, self._request, timeout=self._timeout, small=True
            ) as (attempt,):
                if attempt.result.is_good:
                    return _MTU
            return _Found(
                Cause.FILTERED,
                f"the server has answered, {server.waiting:,} bytes, and they do not arrive",
                "look at the filters between the two (nft list ruleset), in both namespaces",
            )
        if here.socket.waiting and not server.received > 1:
            return _Found(
                Cause.FILTERED,
                f"the handshake passes, the request, {here.socket.waiting} bytes, does not",
                "look at the filters between the two (nft list ruleset), in both namespaces",
            )
        unread = unread_from_stack(server) + server.spliced
        holders = find_holders([server.inode])[server.inode]
        names = ", ".join(sorted({str(each) for each in holders})) or "its program"
        did = f"has not read {unread} bytes of it" if unread else "has read it, and says nothing"
        stopped = " (it is stopped)" if any(_is_stopped(each.pid) for each in holders) else ""
        return _Found(
            Cause.NOT_ANSWERING,
            f"the request has arrived; {names}{stopped} {did}",
            "look into that process: the network has done its part",
        )


_NO_BACKEND = _Found(
    Cause.NO_BACKEND,
    "it is a frontend of a service that has no backend in service here",
    "`sockhop get backends` shows the states of its backends",
)
_CLOSED = _Found(
    Cause.NOT_ANSWERING,
    "the connection is established and then closed by the server, without an answer",
    "look into the server's log: it has taken the connection",
)
_NO_PORT = _Found(
    Cause.NO_PORT,
    "connect() fails at once: all local ports are in use towards this target",
    "`ss -s` counts connections; net.ipv4.ip_local_port_range says which ports there are",
)
_DENIED = _Found(
    Cause.DENIED,
    "connect() fails at once with EPERM",
    "`sockhop get policies` and `sockhop explain` tell which rules hold; other tools' cgroup "
    "programs are in `bpftool cgroup tree`",
)
_AT_ONCE = {Result.CLOSED: _CLOSED, Result.NO_PORT: _NO_PORT, Result.DENIED: _DENIED}
_MTU = _Found(
    Cause.MTU,
    "the answer does not arrive; with segments of 536 bytes it does",
    "a link on the way takes less than it says, and the ICMP messages about it are lost: lower the "
    "MTU of the route (ip route change ... mtu), or let ICMP pass",
)


def _refused(owners: Sequence[Namespace], listeners: Sequence[Socket]) -> _Found:
    if listeners:
        return _Found(
            Cause.FILTERED,
            "a server listens, and yet the connection is refused: something answers in its place",
            "look for rules with `reject` (nft list ruleset), in both namespaces",
        )
    return _Found(
        Cause.NOT_LISTENING,
        f"the connection is refused; in {_named(owners)} no socket listens there"
        if owners
        else "the connection is refused by another node",
        "start the server, or have it listen at this address",
    )


def _timed_out(owners: Sequence[Namespace], listeners: Sequence[Socket]) -> _Found:
    if any(_is_full(each) for each in listeners):
        return _not_accepting(listeners, "the kernel drops new connections")
    if not owners:
        because = "no answer at all, and no network namespace of this node has the address"
        return _Found(
            Cause.FILTERED, because, "look on the way there, and whether the address is in use"
        )
    return _Found(
        Cause.FILTERED,
        f"no answer at all from {_named(owners)} of this node"
        + (", where a server listens with room in its queue" if listeners else ""),
        "look at the filters (nft list ruleset) and at rp_filter, in both namespaces",
    )


def _not_there(owners: Sequence[Namespace], listeners: Sequence[Socket]) -> _Found:
    if any(_is_full(each) for each in listeners):
        return _not_accepting(listeners, "the server's end was never made")
    if owners:
        return _Found(
            Cause.FILTERED,
            "the connection is established here, and its other end is not on this node's address",
            "something between the two answers in the server's place: look for proxies and NAT",
        )
    return _Found(
        Cause.NOT_ANSWERING,
        "the connection is established; its other end is not on this node",
        "run doctor there, too",
    )


def _not_accepting(listeners: Sequence[Socket], what: str) -> _Found:
    holders = find_holders([each.inode for each in listeners])
    names = sorted({str(one) for each in holders.values() for one in each})
    stopped = any(_is_stopped(one.pid) for each in holders.values() for one in each)
    queues = ", ".join(f"{each.unread} of {each.waiting + 1}" for each in listeners)
    return _Found(
        Cause.NOT_ACCEPTING,
        f"{what}; {', '.join(names) or 'the server'}{' (it is stopped)' if stopped else ''} does "
        f"not call accept(): {queues} places of its queue are taken",
        "look into that process; a longer queue (listen(), net.core.somaxconn) only delays it",
    )


def _spliced(of: HalfSpliced) -> _Found:
    stale = "stale" in of.cause
    return _Found(
        Cause.STALE_ENTRY if stale else Cause.HALF_SPLICED,
        f"{of.cause}; {of.spliced.local} ({of.spliced.handler}) splices to it, and not to "
        f"{of.victim.local} ({of.victim.handler}) of {', '.join(of.victim.processes) or '?'}",
        "`sockhop heal` deletes the entry"
        if stale
        else "two connections share a key: the program that fills the map has to tell network "
        "namespaces apart; turn its splicing off",
    )


def _is_full(listener: Socket) -> bool:
    """Whether the accept queue takes no more: `waiting` is its limit (net/ipv4/tcp_diag.c)."""
    return listener.unread > listener.waiting


def _named(owners: Sequence[Namespace]) -> str:
    return f"network namespace {' or '.join(str(each.inode) for each in owners)}"


def _own_namespace(places: Sequence[Namespace]) -> Namespace:
    inode = Path("/proc/thread-self/ns/net").stat().st_ino
    return next(each for each in places if each.inode == inode)


def _port(of: str) -> int:
    return int(of.rpartition(":")[2])


def _is_stopped(pid: int) -> bool:
    with suppress(OSError):
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        return state in _STOPPED
    return False
