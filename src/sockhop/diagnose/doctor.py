"""Tells why connections to an address fail or hang: dials, looks where they hang, concludes."""

import os
import socket
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import NamedTuple

import msgspec

from sockhop.datapath.balancer import BalanceMaps, NotInstalled
from sockhop.datapath.listing import list_here
from sockhop.datapath.records import BackendRecord, FrontendKey
from sockhop.datapath.sockets import Socket
from sockhop.diagnose.causes import Cause
from sockhop.diagnose.dial import Attempt, Result, dialled
from sockhop.diagnose.pairs import examine, match_pairs, unread_from_stack
from sockhop.diagnose.records import AuditFlag
from sockhop.diagnose.sentences import (
    AT_ONCE,
    LISTEN,
    MTU,
    NO_BACKEND,
    Found,
    is_stopped,
    not_accepting,
    not_there,
    refused,
    spliced,
    timed_out,
)
from sockhop.diagnose.visit import End, Visitor, open_sockmaps
from sockhop.errors import SystemLackError
from sockhop.kernel.namespaces import Namespace, NamespaceGone, Namespaces, entered
from sockhop.kernel.procfs import find_holders
from sockhop.kernel.routes import Routes
from sockhop.model import endpoint, is_loopback, unpack_address

__all__ = ["Conclusion", "Diagnosis", "Dialling", "diagnose"]

Target = tuple[bytes, int]


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
                hint="this needs root, to enter them",
            )

    def visit(self, origin: Origin, target: Target) -> tuple[Dialling, list[Found]]:
        found: list[Found] = []
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

    def _explain(self, origin: Origin, target: Target, attempt: Attempt) -> list[Found]:
        backends = self._backends(target)
        if backends is not None:
            if attempt.result is Result.UNREACHABLE:
                return [NO_BACKEND]
            if attempt.result in (Result.REFUSED, Result.TIMEOUT):
                return self._of_backends(origin, backends)
        if at_once := AT_ONCE.get(attempt.result):
            return [at_once]
        if attempt.result is Result.UNREACHABLE:
            because = f"connect() fails at once: {os.strerror(attempt.errno)}"
            advice = "look at the routes of this namespace (ip route get)"
            return [Found(Cause.NO_ROUTE, because, advice)]
        owners = self.owners(target, origin.place or _own_namespace(self._places))
        listeners = self._listeners(owners, target)
        if attempt.result is Result.SILENT:
            return [self._silent(origin, target, attempt, owners, listeners)]
        explain = refused if attempt.result is Result.REFUSED else timed_out
        return [explain(owners, listeners)]

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
                for each in list_here((socket.IPPROTO_TCP,), states=LISTEN):
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

    def _of_backends(self, origin: Origin, backends: Sequence[BackendRecord]) -> list[Found]:
        """Dial each backend by itself: those that fail are gone."""
        found = []
        for each in backends:
            target = (each.address, each.port)
            with dialled(origin.place, target, b"", timeout=self._timeout) as (attempt,):
                if attempt.result.is_good:
                    continue
            name = endpoint(unpack_address(each.address), each.port)
            found.append(
                Found(
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
    ) -> Found:
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
                return spliced(each)
        inode = os.fstat(attempt.socket.fileno()).st_ino
        for one, other in match_pairs(self._visitor.ends(dict.fromkeys(places))):
            for here, there in ((one, other), (other, one)):
                if here.socket.inode == inode:
                    return self._of_server(origin, target, here, there, listeners)
        return not_there(owners, listeners)

    def _of_server(
        self,
        origin: Origin,
        target: Target,
        here: End,
        there: End,
        listeners: Sequence[Socket],
    ) -> Found:
        server = there.socket
        if not server.inode:
            return not_accepting(listeners, "the connection waits to be accepted")
        if server.waiting and server.state_name == "ESTAB":
            with dialled(
                origin.place, target, self._request, timeout=self._timeout, small=True
            ) as (attempt,):
                if attempt.result.is_good:
                    return MTU
            return Found(
                Cause.FILTERED,
                f"the server has answered, {server.waiting:,} bytes, and they do not arrive",
                "look at the filters between the two (nft list ruleset), in both namespaces",
            )
        if here.socket.waiting and not server.received > 1:
            return Found(
                Cause.FILTERED,
                f"the handshake passes, the request, {here.socket.waiting} bytes, does not",
                "look at the filters between the two (nft list ruleset), in both namespaces",
            )
        unread = unread_from_stack(server) + server.spliced
        holders = find_holders([server.inode])[server.inode]
        names = ", ".join(sorted({str(each) for each in holders})) or "its program"
        did = f"has not read {unread} bytes of it" if unread else "has read it, and says nothing"
        stopped = " (it is stopped)" if any(is_stopped(each.pid) for each in holders) else ""
        return Found(
            Cause.NOT_ANSWERING,
            f"the request has arrived; {names}{stopped} {did}",
            "look into that process: the network has done its part",
        )


def _own_namespace(places: Sequence[Namespace]) -> Namespace:
    inode = Path("/proc/thread-self/ns/net").stat().st_ino
    return next(each for each in places if each.inode == inode)


def _port(of: str) -> int:
    return int(of.rpartition(":")[2])
