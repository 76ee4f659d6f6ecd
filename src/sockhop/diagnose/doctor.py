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
from sockhop.datapath.records import BackendRecord
from sockhop.datapath.sockets import Socket
from sockhop.diagnose.causes import Cause
from sockhop.diagnose.dial import Attempt, Dialling, Question, Result, dialled
from sockhop.diagnose.frontends import backends_of
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
    Found,
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
from sockhop.model import endpoint, is_loopback, unpack_address

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
    is a `loopback` one, which every namespace has.

    `evidence`: what else was tried where something fails, and what that rules out; `kubelet`: lines
    of its log about the target.
    """

    target: str
    loopback: bool
    owners: list[int]
    ways: list[Way]
    dialled: list[Dialling]
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
    conclusions: list[Conclusion] = []
    with Visitor() as visitor:
        doctor = _Doctor(visitor, pins, question)
        for origin in origins:
            with suppress(NamespaceGone):
                dialling, found = doctor.visit(origin)
                asked.append((origin, dialling))
                conclusions += (_conclusion(each, origin.name) for each in found)
        ways = doctor.ways([origin for origin, _ in asked])
        conclusions += [_only_afar(each) for each in afar if each.failed and not conclusions]
        rows = [row for _, row in asked] + afar
        fails = any(each.failed for each in rows)
        compared = doctor.compare(origins) if fails and not alone else []
        seen = evidence(question, asked, [*afar, *compared]) if fails and not alone else []
    return Diagnosis(
        question.name,
        is_loopback(unpack_address(question.address)),
        sorted({each.inode for each in doctor.owners()}),
        ways,
        rows + compared,
        conclusions,
        seen,
        probe_failures(question.name, logs) if fails and not alone else [],
    )


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
    def __init__(self, visitor: Visitor, pins: Path, question: Question) -> None:
        self._visitor = visitor
        self._pins = pins
        self._question = question
        self._places = Namespaces().all()
        if not self._places:
            raise SystemLackError(
                "no network namespace can be told from another here",
                hint="this needs root, to enter them",
            )
        self._here = _own_namespace(self._places)
        loopback = is_loopback(unpack_address(question.address))
        self._topology = None if loopback else Topology(self._places, question.address)

    def visit(self, origin: Origin) -> tuple[Dialling, list[Found]]:
        found: list[Found] = []
        with dialled(origin.place, self._question) as attempts:
            results = Counter(each.result for each in attempts)
            for result in results:
                first = next(each for each in attempts if each.result is result)
                if not result.is_good:
                    found += self._explain(origin, first)
        causes = {each.cause: each for each in found}
        return Dialling.of(origin.name, results), list(causes.values())

    def ways(self, origins: Sequence[Origin]) -> list[Way]:
        """Return how each of *origins* gets to the target; none where it is a frontend."""
        if self._topology is None or self._backends() is not None:
            return []
        found = [self._topology.way(each.name, each.place or self._here) for each in origins]
        return [each for each in found if each]

    def compare(self, origins: Sequence[Origin]) -> list[Dialling]:
        """Dial from where nobody has asked for: where the address is, and from some others."""
        if self._topology is None or self._backends() is not None:
            return []
        known = {(each.place or self._here).inode for each in origins}
        owners = [each for each in self.owners() if each.inode not in known]
        # Where the way is not known to lead there, the address may be that of another.
        others = self._topology.sources() if self.owners() else []
        return compare(self._question, owners, [each for each in others if each.inode not in known])

    def owners(self, place: Namespace | None = None) -> list[Namespace]:
        """Return the namespaces that have the target's address; a loopback one is *place*'s own."""
        if self._topology is None:
            return [each for each in self._places if place and each.inode == place.inode]
        return self._topology.owners()

    # --- one failure --------------------------------------------------------------------------

    def _explain(self, origin: Origin, attempt: Attempt) -> list[Found]:
        backends = self._backends()
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
        owners = self.owners(origin.place or self._here)
        listeners = self._listeners(owners)
        if attempt.result is Result.SILENT:
            return [self._silent(origin, attempt, owners, listeners)]
        explain = refused if attempt.result is Result.REFUSED else timed_out
        return [explain(owners, listeners)]

    def _listeners(self, owners: Sequence[Namespace]) -> list[Socket]:
        """Return the sockets that listen for connections to the target."""
        address = unpack_address(self._question.address)
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
                    if each.local_port == self._question.port and (
                        local in wanted or (local == "::" and each.inode in for_four)
                    ):
                        found.append(each)
        return found

    def _backends(self) -> list[BackendRecord] | None:
        """Return the backends if the target is a frontend of ours; None if it is not."""
        return backends_of(self._pins, (self._question.address, self._question.port))

    def _of_backends(self, origin: Origin, backends: Sequence[BackendRecord]) -> list[Found]:
        """Dial each backend by itself: those that fail are gone."""
        found = []
        for each in backends:
            alone = Question(each.address, each.port, "", 1, self._question.timeout)
            with dialled(origin.place, alone) as (attempt,):
                if attempt.result.is_good:
                    continue
            name = endpoint(unpack_address(each.address), each.port)
            found.append(
                Found(
                    Cause.BACKEND_GONE,
                    f"the backend {name}, dialled by itself: {attempt.result}",
                    "start it, or take it out of the service, as `health` does by itself",
                )
            )
        return found

    def _silent(
        self,
        origin: Origin,
        attempt: Attempt,
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
                    return self._of_server(origin, here, there, listeners)
        return not_there(owners, listeners)

    def _of_server(
        self,
        origin: Origin,
        here: End,
        there: End,
        listeners: Sequence[Socket],
    ) -> Found:
        server = there.socket
        if not server.inode:
            return not_accepting(listeners, "the connection waits to be accepted")
        if server.waiting and server.state_name == "ESTAB":
            once = replace(self._question, count=1)
            with dialled(origin.place, once, small=True) as (attempt,):
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
