"""Looks now and then whether connections of this node are harmed, at little cost.

Findings are what two looks in a row have seen, unchanged: sockets that are just being opened or
closed look odd for a moment.
"""

import socket
import time
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from threading import Lock
from typing import NamedTuple

import msgspec

from sockhop.datapath.listing import list_here
from sockhop.datapath.sockets import Socket
from sockhop.diagnose.audit import Audit, Held, judge, look
from sockhop.diagnose.causes import Cause, Finding
from sockhop.diagnose.pairs import check_pairs
from sockhop.diagnose.sentences import LISTEN, Found, is_full, not_accepting, spliced
from sockhop.diagnose.visit import Visitor, open_sockmaps
from sockhop.kernel.namespaces import Namespace, NamespaceGone, Namespaces, entered
from sockhop.kernel.procfs import find_holders
from sockhop.model import endpoint, unpack_address

__all__ = ["Changes", "Watch"]

_AGAIN = 0.2
"""Seconds between two looks at connections of which one is suspicious."""
_SELDOM = 10
"""Every so many looks both ends of all connections are compared, without a reason, too."""
_MOST = 100
"""So many findings of a kind are told of; a node with more has one cause for all."""


class Changes(NamedTuple):
    """What a look has found that was not there before, and what is over."""

    begun: list[Finding]
    over: list[Finding]


class Watch:
    """Remembers what the look before has seen. Use as a context manager; one thread at a time.

    A look reads every sockmap and sockhash, and the queues of all listening TCP sockets; and where
    an entry is stale that can be in the way of others, all TCP sockets (a few milliseconds for each
    network namespace). Needs root and Linux 5.10.
    """

    causes = (Cause.STALE_ENTRY, Cause.HALF_SPLICED, Cause.NOT_ACCEPTING)
    """What it may find."""

    def __init__(self) -> None:
        self.findings: dict[Hashable, Finding] = {}
        self._visitor: Visitor | None = None
        self._stale: dict[int, Mapping[bytes, Held]] = {}
        self._full: set[int] = set()
        self._looks = 0
        self._namespaces = Namespaces()
        self._lock = Lock()

    def close(self) -> None:
        """Unload the programs, after the look that another thread may be at."""
        with self._lock:
            if self._visitor:
                self._visitor.close()
                self._visitor = None

    def __enter__(self) -> "Watch":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def look(self) -> Changes:
        """Look, and return what has changed. SystemLackError where the kernel does not let us."""
        with self._lock, ExitStack() as stack:
            if self._visitor is None:
                self._visitor = Visitor()
            places = self._namespaces.all()
            now = time.time()
            found: dict[Hashable, Finding] = {}
            audits = self._audit(self._visitor, stack)
            for key, each in (
                *self._stale_entries(audits),
                *self._half_spliced(self._visitor, audits, places),
                *self._not_accepting(places),
            ):
                old = self.findings.get(key)
                found[key] = msgspec.structs.replace(each, since=old.since if old else now)
            before, self.findings = self.findings, found
            return Changes(
                [each for key, each in found.items() if key not in before],
                [each for key, each in before.items() if key not in found],
            )

    def _audit(self, visitor: Visitor, stack: ExitStack) -> list[Audit]:
        looks = [look(visitor, of) for of in open_sockmaps(stack)]
        audits = [judge(self._stale.get(each.map.info.id, {}), each) for each in looks]
        self._stale = {each.map.info.id: each.stale for each in looks if each.stale}
        return audits

    def _stale_entries(self, audits: Sequence[Audit]) -> Iterator[tuple[Hashable, Finding]]:
        for each in audits:
            result = each.result
            if not result.findings:
                continue
            first = result.stale_entries[0]
            inodes = {entry.inode for entry in result.stale_entries} - {0}
            holders = _names(inodes)
            by = f", kept open by {', '.join(holders)}" if holders else ""
            text = (
                f"map {result.id} ({result.name}) has {result.findings:,} stale of "
                f"{result.entries:,} entries{by}: a new connection with the addresses and ports "
                f"of one, such as {first.local} and {first.remote}, hangs"
            )
            advice = f"`sockhop audit --id {result.id}` lists them, `sockhop heal` deletes them"
            found = Found(Cause.STALE_ENTRY, text, advice)
            yield (found.cause, result.id), _finding(found, processes=holders)

    def _half_spliced(
        self, visitor: Visitor, audits: Sequence[Audit], places: Sequence[Namespace]
    ) -> Iterator[tuple[Hashable, Finding]]:
        # Looking at all TCP sockets is dear, and a victim is rarely without a stale entry: then
        # two namespaces use the same addresses, and their sockets share a map.
        filled = [each for each in audits if each.result.in_the_way and each.result.entries]
        self._looks += bool(filled)
        if not (
            any(each.look.stale for each in filled)
            or any(each.cause is Cause.HALF_SPLICED for each in self.findings.values())
            or self._looks % _SELDOM == 1
        ):
            return
        first = visitor.ends(places)
        if not check_pairs(first, first, audits).findings:
            return
        time.sleep(_AGAIN)
        pairs = check_pairs(first, visitor.ends(places), audits)
        for each in [each for each in pairs.half_spliced if each.harmful][:_MOST]:
            found = spliced(each)._replace(cause=Cause.HALF_SPLICED)
            side = each.victim
            yield (
                (found.cause, side.netns, side.inode),
                _finding(found, side.local, side.remote, side.netns, side.processes),
            )

    def _not_accepting(self, places: Sequence[Namespace]) -> Iterator[tuple[Hashable, Finding]]:
        full: dict[int, Socket] = {}
        for place in places:
            with suppress(NamespaceGone), entered(place):
                for each in list_here((socket.IPPROTO_TCP,), states=LISTEN):
                    if is_full(each):
                        full[each.cookie] = each
        steady = [each for cookie, each in full.items() if cookie in self._full]
        self._full = set(full)
        for each in steady[:_MOST]:
            where = endpoint(unpack_address(each.local_address), each.local_port)
            text = f"{where}: the kernel drops new connections"
            found = not_accepting([each], text)
            yield (
                (found.cause, each.cookie),
                _finding(found, where, netns=each.netns, processes=_names({each.inode})),
            )


def _names(inodes: set[int]) -> list[str]:
    return sorted({str(one) for each in find_holders(inodes).values() for one in each})


def _finding(
    found: Found,
    local: str = "",
    remote: str = "",
    netns: int = 0,
    processes: Sequence[str] = (),
) -> Finding:
    return Finding(*found, 0.0, local, remote, netns, list(processes))
