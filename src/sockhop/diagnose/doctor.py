"""Tells why connections to an address fail or hang: dials, looks where they hang, concludes."""

import os
import socket
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path

import msgspec

from sockhop.datapath.listing import list_here
from sockhop.datapath.sockets import Socket
from sockhop.diagnose.causes import Cause
from sockhop.diagnose.dial import Attempt, Dialling, Question, Result, dialled
from sockhop.diagnose.frontends import Address, Frontend, Frontends, named
from sockhop.diagnose.kubelet import probe_failures
from sockhop.diagnose.matrix import Origin, compare, evidence
from sockhop.diagnose.pairs import examine, match_pairs, unread_from_stack
from sockhop.diagnose.records import AuditFlag
from sockhop.diagnose.remote import dial_remotely
from sockhop.diagnose.sentences import (
    AT_ONCE,
    LISTEN,
    MTU,
    NO_BACKEND,
    NOT_BALANCED,
    Found,
    gone,
    is_stopped,
    not_accepting,
    not_there,
    refused,
    spliced,
    timed_out,
)
from sockhop.diagnose.topology import Topology, Way
from sockhop.diagnose.visit import End, Visitor, open_sockmaps
from sockhop.errors import SystemLackError
from sockhop.kernel.namespaces import Namespace, NamespaceGone, Namespaces, entered
from sockhop.kernel.procfs import find_holders
from sockhop.model import is_loopback, unpack_address

__all__ = ["Conclusion", "Diagnosis", "diagnose"]


class Conclusion(msgspec.Struct, frozen=True):
    """A cause, where it was seen from, what shows it, what to do, and in which layer it lies."""

    cause: Cause
    origin: str
    because: str
    advice: str
    layer: str


class Diagnosis(msgspec.Struct, frozen=True):
    """The answer for a target. `owners`: the namespaces (inodes) that have its address, none if it
    is a `loopback` one, which every namespace has. `service`: whose frontend it is.

    `backends`: the same connections by where they went. `evidence`: what else was tried where
    something fails, and what that rules out; `kubelet`: lines of its log about the target.
    """

    target: str
    service: str
    loopback: bool
    owners: list[int]
    ways: list[Way]
    dialled: list[Dialling]
    backends: list[Dialling]
    conclusions: list[Conclusion]
    evidence: list[str]
    kubelet: list[str]

    @property
    def fails(self) -> bool:
        """Whether a connection fails from a place that was asked for."""
        return any(each.failed for each in self.dialled if not each.compared)


def diagnose(
    question: Question,
    origins: Sequence[Origin],
    pins: Path,
    *,
    remotes: Sequence[Sequence[str]] = (),
    logs: Sequence[Path] | None = None,
    alone: bool = False,
) -> Diagnosis:
    """Dial from each of *origins*, and behind each of *remotes* (commands that run another).

    Each kind of failure is looked into once for each origin. Where one fails, other namespaces are
    dialled from, too, and kubelet's logs are read, unless *alone*. *pins*: the bpffs directory of
    an agent, if one runs; *logs*: kubelet's, None for where they usually are.
    """
    # First: a command that does not get there is said at once.
    afar = [dial_remotely(each, question) for each in remotes]
    asked: list[tuple[Origin, Dialling]] = []
    backends: list[Dialling] = []
    conclusions: list[Conclusion] = []
    with Visitor() as visitor, Frontends(pins) as frontends:
        doctor = _Doctor(visitor, frontends, question)
        for origin in origins:
            with suppress(NamespaceGone):
                attempts, found = doctor.visit(origin)
                asked.append(
                    (origin, Dialling.of(origin.name, Counter(e.result for e in attempts)))
                )
                backends += _by_backend(origin, attempts)
                conclusions += (_conclusion(each, origin.name) for each in found)
        ways = doctor.ways([origin for origin, _ in asked])
        conclusions += [_only_afar(each) for each in afar if each.failed and not conclusions]
        rows = [row for _, row in asked] + afar
        fails = any(each.failed for each in rows)
        compared = doctor.compare(origins) if fails and not alone else []
        others = [*afar, *compared]
        balanced = bool(doctor.service)
        seen = evidence(question, asked, others, balanced=balanced) if fails and not alone else []
    return Diagnosis(
        question.name,
        doctor.service,
        is_loopback(unpack_address(question.address)),
        sorted({each.inode for each in doctor.owners()}),
        ways,
        rows + compared,
        backends,
        conclusions,
        seen,
        probe_failures(question.name, logs) if fails and not alone else [],
    )


def _by_backend(origin: Origin, attempts: Sequence[Attempt]) -> list[Dialling]:
    results: dict[Address, Counter[Result]] = {}
    for each in attempts:
        if each.backend:
            results.setdefault(each.backend, Counter())[each.result] += 1
    return [
        Dialling.of(origin.name, found, backend=named(where))
        for where, found in sorted(results.items())
    ]


def _only_afar(row: Dialling) -> Conclusion:
    found = Found(
        Cause.FILTERED,
        f"{row.failed} of {row.attempts} connections from there fail, and none from this node",
        "run doctor there, and look at what is between the two nodes",
    )
    return _conclusion(found, row.origin)


def _conclusion(of: Found, origin: str) -> Conclusion:
    return Conclusion(of.cause, origin, of.because, of.advice, of.cause.layer)


class _Doctor:
    def __init__(self, visitor: Visitor, frontends: Frontends, question: Question) -> None:
        self._visitor = visitor
        self._frontends = frontends
        self._question = question
        self._places = Namespaces().all()
        if not self._places:
            raise SystemLackError(
                "no network namespace can be told from another here",
                hint="this needs root, to enter them",
            )
        self._here = _own_namespace(self._places)
        self._topologies: dict[bytes, Topology | None] = {}
        frontend = self._frontend(self._here)
        self.service = frontend.service if frontend else ""

    def visit(self, origin: Origin) -> tuple[Sequence[Attempt], list[Found]]:
        """Dial from *origin*; return how that went, and what is wrong, one for each cause."""
        found: dict[tuple[Cause, Address | None], Found] = {}
        with dialled(
            origin.place, self._question, backend_of=self._frontends.backend_of
        ) as attempts:
            kinds: dict[tuple[Result, Address | None], Attempt] = {}
            for attempt in attempts:
                kinds.setdefault(attempt.kind, attempt)
            for attempt in kinds.values():
                if not attempt.result.is_good:
                    why = self._explain(origin, attempt)
                    found[why.cause, attempt.backend] = why
        return attempts, list(found.values())

    def ways(self, origins: Sequence[Origin]) -> list[Way]:
        """Return how each of *origins* gets to the target; none where it is a frontend."""
        topology = self._topology(self._question)
        if topology is None or self.service:
            return []
        found = [topology.way(each.name, each.place or self._here) for each in origins]
        return [each for each in found if each]

    def compare(self, origins: Sequence[Origin]) -> list[Dialling]:
        """Dial from where nobody has asked for: where the address is, and from some others."""
        topology = self._topology(self._question)
        if topology is None or self.service:
            return []
        known = {(each.place or self._here).inode for each in origins}
        owners = [each for each in topology.owners() if each.inode not in known]
        # Where the way is not known to lead there, the address may be that of another.
        others = topology.sources() if topology.owners() else []
        return compare(self._question, owners, [each for each in others if each.inode not in known])

    def owners(self) -> list[Namespace]:
        """Return the namespaces that have the target's address, none for a loopback one."""
        topology = self._topology(self._question)
        return topology.owners() if topology else []

    def _owners(self, target: Question, place: Namespace) -> list[Namespace]:
        """Return the namespaces that have an address; a loopback one is *place*'s own."""
        topology = self._topology(target)
        if topology is None:
            return [each for each in self._places if each.inode == place.inode]
        return topology.owners()

    def _topology(self, target: Question) -> Topology | None:
        """Return what leads to an address, None for a loopback one."""
        if is_loopback(unpack_address(target.address)):
            return None
        if target.address not in self._topologies:
            self._topologies[target.address] = Topology(self._places, target.address)
        return self._topologies[target.address]

    def _frontend(self, place: Namespace) -> Frontend | None:
        return self._frontends.at(
            Address(self._question.address, self._question.port), place.cookie
        )

    # --- one failure --------------------------------------------------------------------------

    def _explain(self, origin: Origin, attempt: Attempt) -> Found:
        if attempt.backend is None:
            return self._not_balanced(origin, attempt) or self._of_server(
                origin, attempt, self._question
            )
        address, port = attempt.backend
        backend = replace(self._question, address=address, port=port, count=1)
        if attempt.result in (Result.REFUSED, Result.TIMEOUT):
            with dialled(origin.place, replace(backend, path="")) as (alone,):
                if not alone.result.is_good:
                    return gone(named(attempt.backend), alone.result)
        found = self._of_server(origin, attempt, backend)
        return found._replace(because=f"at the backend {named(attempt.backend)}: {found.because}")

    def _not_balanced(self, origin: Origin, attempt: Attempt) -> Found | None:
        """Say why a connection to a frontend went to no backend; None where it is no frontend."""
        frontend = self._frontend(origin.place or self._here)
        if frontend is None:
            return None
        # EPERM before Linux 5.18.
        if not frontend.serves and attempt.result in (Result.UNREACHABLE, Result.DENIED):
            return NO_BACKEND
        return None if attempt.result in AT_ONCE else NOT_BALANCED

    def _of_server(self, origin: Origin, attempt: Attempt, target: Question) -> Found:
        if at_once := AT_ONCE.get(attempt.result):
            return at_once
        if attempt.result is Result.UNREACHABLE:
            because = f"connect() fails at once: {os.strerror(attempt.errno)}"
            advice = "look at the routes of this namespace (ip route get)"
            return Found(Cause.NO_ROUTE, because, advice)
        owners = self._owners(target, origin.place or self._here)
        listeners = self._listeners(target, owners)
        if attempt.result is Result.SILENT:
            return self._silent(origin, attempt, target, owners, listeners)
        explain = refused if attempt.result is Result.REFUSED else timed_out
        return explain(owners, listeners)

    def _listeners(self, target: Question, owners: Sequence[Namespace]) -> list[Socket]:
        """Return the sockets that listen for connections to *target*."""
        address = unpack_address(target.address)
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
                    if each.local_port == target.port and (
                        local in wanted or (local == "::" and each.inode in for_four)
                    ):
                        found.append(each)
        return found

    def _silent(
        self,
        origin: Origin,
        attempt: Attempt,
        target: Question,
        owners: Sequence[Namespace],
        listeners: Sequence[Socket],
    ) -> Found:
        """Look at both ends of a connection that hangs."""
        own = attempt.socket.getsockname()[1]
        with ExitStack() as stack:
            places = [*owners, origin.place or self._here]
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
                    return self._hanging(origin, target, (here, there), listeners)
        return not_there(owners, listeners)

    @staticmethod
    def _hanging(
        origin: Origin, target: Question, ends: tuple[End, End], listeners: Sequence[Socket]
    ) -> Found:
        here, there = ends
        server = there.socket
        if not server.inode:
            return not_accepting(listeners, "the connection waits to be accepted")
        if server.waiting and server.state_name == "ESTAB":
            with dialled(origin.place, replace(target, count=1), small=True) as (attempt,):
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
