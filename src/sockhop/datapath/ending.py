"""Ends exactly the sockets that are meant, in whatever network namespace they are."""

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from contextlib import ExitStack, suppress
from enum import StrEnum
from math import inf
from pathlib import Path
from typing import Protocol

from sockhop.datapath.balancer import BalanceMaps
from sockhop.datapath.end_by_iterator import IteratorMethod, has_sock_destroy
from sockhop.datapath.end_by_netlink import NetlinkMethod
from sockhop.datapath.outcome import Action, Outcome
from sockhop.datapath.pins import is_pinned
from sockhop.datapath.records import BackendRecord
from sockhop.datapath.sockets import Pair, Socket, Sockets
from sockhop.errors import SystemLackError
from sockhop.kernel.namespaces import Namespace, NamespaceGone, Namespaces, namespace_of
from sockhop.kernel.procfs import borrowed, find_holders
from sockhop.kernel.syscall import KernelError

__all__ = ["Action", "Engine", "EngineName", "Method", "Outcome", "choose_engine"]

_LOG = logging.getLogger(__name__)

PASSES = 8
"""At most so many in one namespace: lists skip sockets while others come and go, before Linux 6.16
(UDP) and 6.17 (TCP), so what a pass has missed the next one ends.
"""


class Method(Protocol):
    """A way to end sockets."""

    @property
    def name(self) -> str: ...
    @property
    def protocols(self) -> Set[int]: ...
    def end_pairs(
        self, pairs: Set[Pair], known: Mapping[int, BackendRecord], places: Iterable[Namespace]
    ) -> list[Outcome]: ...
    def end_sockets(self, sockets: Sequence[Socket], place: Namespace) -> list[Outcome]: ...
    def prepare(self) -> None: ...
    def close(self) -> None: ...


class Engine:
    """Ends sockets with the first of its methods; where the kernel refuses that, with the next.

    `name` is the first method's; `failures` counts by method how often it had to be left;
    `namespaces` remembers where it has found them.
    """

    def __init__(self, pins: Path, methods: Sequence[Method]) -> None:
        self.failures: Counter[str] = Counter()
        self._pins = pins
        self._methods = methods
        self.namespaces = Namespaces()

    @property
    def name(self) -> str:
        """The method that is tried first: iterator or netlink."""
        return self._methods[0].name

    def close(self) -> None:
        """Let the kernel forget what the methods hold there."""
        for method in self._methods:
            method.close()

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def prepare(self) -> None:
        """Load what ends sockets now, so that the first one to end need not wait for it."""
        with suppress(SystemLackError):  # it is tried again, and counted, when it is needed
            self._methods[0].prepare()

    def sever_pairs(
        self, pairs: Set[tuple[int, int]], *, namespaces: Iterable[int] | None = None
    ) -> list[Outcome]:
        """End the sockets that are with a backend: *pairs* of service id and backend id.

        Only sockets whose provenance names the pair, whose peer is that backend now, that are
        connected and open. Only where the live index says that there are any, and of those only in
        *namespaces* (cookies). Each socket once in the result, those that are left not at all.
        """
        wanted = {Pair(*pair) for pair in pairs}
        outcomes: dict[int, Outcome] = {}
        with BalanceMaps(self._pins) as maps, ExitStack() as held:
            at_most = self._count(maps, wanted, None if namespaces is None else set(namespaces))
            known = maps.backends.get_many(pair.backend for pair in wanted)
            places = self.namespaces.by_cookie(at_most)
            if lost := at_most.keys() - {place.cookie for place in places}:
                hidden = self._sockets_of(wanted, lost)
                places += self._through(hidden, held)
                outcomes |= _unreachable(hidden, places)
            for _ in range(PASSES):
                if not places:
                    break
                found = self._pass(wanted, known, places)
                outcomes.update((each.socket.cookie, each) for each in found)
                ended = Counter(s.socket.netns for s in found if s.action is Action.SEVERED)
                for place in places:
                    at_most[place.cookie] -= ended[place.inode]
                # The index is an upper bound: where as many have ended, there are no others.
                places = [p for p in places if ended[p.inode] and at_most[p.cookie] > 0]
        return list(outcomes.values())

    def sever_sockets(self, sockets: Iterable[Socket]) -> list[Outcome]:
        """End exactly these sockets, if they have the same ends as before; an outcome for each.

        LISTEN, TIME-WAIT, sockets of half-open connections, UDP that is not connected, and sockets
        that no process holds are left.
        """
        outcomes: list[Outcome] = []
        by_place: dict[int, list[Socket]] = {}
        for each in sockets:
            if reason := each.reason_to_leave:
                outcomes.append(Outcome(each, Action.LEFT, reason))
            else:
                by_place.setdefault(each.netns, []).append(each)
        with ExitStack() as held:
            places = self.namespaces.by_inode(by_place)
            lost = by_place.keys() - {place.inode for place in places}
            places += self._through([s for number in lost for s in by_place[number]], held)
            for place in places:
                with suppress(NamespaceGone):
                    outcomes += self._end_in(place, by_place[place.inode])
                    del by_place[place.inode]
        left = [each for others in by_place.values() for each in others]
        return outcomes + [Outcome(each, Action.GONE, "its namespace is gone") for each in left]

    def _count(
        self, maps: BalanceMaps, pairs: Set[Pair], only: Set[int] | None
    ) -> dict[int, float]:
        """Return how many sockets of *pairs* there are at most, by namespace (cookie).

        Any number, everywhere, where the live index does not have all sockets.
        """
        counted: dict[int, float] = {}
        for key, number in maps.live.items() if pairs else ():
            if number and (key.service, key.backend) in pairs:
                counted[key.netns] = counted.get(key.netns, 0) + number
        if pairs and not maps.index_is_whole():
            counted |= {place.cookie: inf for place in self.namespaces.all()}
        return {place: n for place, n in counted.items() if only is None or place in only}

    def _sockets_of(self, pairs: Set[Pair], cookies: Set[int]) -> list[Socket]:
        """Return those of *pairs* in these namespaces: the index may count others for ever."""
        with Sockets(self._pins) as programs:
            found = programs.of_pairs(pairs)
        return [s for s in found if s.origin and s.origin.netns in cookies and s.is_open]

    def _through(self, sockets: Sequence[Socket], held: ExitStack) -> list[Namespace]:
        """Return the namespaces to which nothing but these sockets leads, while *held* is open."""
        holders = find_holders({each.inode for each in sockets})
        found: dict[int, Namespace] = {}
        for each in sockets:
            for holder in holders.get(each.inode, ()):
                if each.netns not in found:
                    with suppress(KernelError), borrowed(holder) as own:
                        found[each.netns] = held.enter_context(namespace_of(own))
        return list(found.values())

    def _pass(
        self, pairs: Set[Pair], known: Mapping[int, BackendRecord], places: Sequence[Namespace]
    ) -> list[Outcome]:
        return self._try(lambda method: method.end_pairs(pairs, known, places), self._methods)

    def _end_in(self, place: Namespace, sockets: Sequence[Socket]) -> list[Outcome]:
        protocols = {each.protocol for each in sockets}
        able = [method for method in self._methods if protocols <= method.protocols]
        if not able:
            reason = f"the engine {self.name} does not end sockets of this protocol"
            return [Outcome(each, Action.REFUSED, reason) for each in sockets]
        return self._try(lambda method: method.end_sockets(sockets, place), able)

    def _try(
        self, end: Callable[[Method], list[Outcome]], methods: Sequence[Method]
    ) -> list[Outcome]:
        *others, last = methods
        for method in others:
            try:
                return end(method)
            except SystemLackError as error:
                _LOG.warning(
                    "ending sockets by %s failed, now by %s: %s", method.name, last.name, error
                )
                self.failures[method.name] += 1
        return end(last)


def _unreachable(hidden: Sequence[Socket], places: Sequence[Namespace]) -> dict[int, Outcome]:
    reached = {place.inode for place in places}
    reason = "its network namespace cannot be entered"
    return {
        each.cookie: Outcome(each, Action.REFUSED, reason)
        for each in hidden
        if each.netns not in reached and not each.reason_to_leave
    }


class EngineName(StrEnum):
    """Which method ends sockets: the best that this kernel has, or one of them."""

    AUTO = "auto"
    ITERATOR = "iterator"
    NETLINK = "netlink"


def choose_engine(pins: Path, name: EngineName = EngineName.AUTO) -> Engine:
    """Return the engine for the maps below *pins*, which need not be there to end by hand.

    By itself it ends sockets with iterators where the kernel can, and falls back on SOCK_DESTROY. A
    method that is named stands alone.
    """
    iterator, netlink = IteratorMethod(pins), NetlinkMethod(pins)
    if name is EngineName.NETLINK:
        return Engine(pins, [netlink])
    if name is EngineName.ITERATOR:
        return Engine(pins, [iterator])
    installed = is_pinned(pins, "provenance")
    return Engine(pins, [iterator, netlink] if installed and has_sock_destroy() else [netlink])
