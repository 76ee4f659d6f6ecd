"""Ends sockets from BPF iterators with bpf_sock_destroy.

Linux kernel commit 4ddbcb886268 ("bpf: Add bpf_sock_destroy kfunc") (in v6.5).
"""

import os
import socket
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from sockhop.datapath.balancer import map_directory
from sockhop.datapath.outcome import Action, Outcome
from sockhop.datapath.records import BackendRecord, SocketEnds
from sockhop.datapath.sockets import Pair, Socket, SocketRecords, held, read_iterator
from sockhop.errors import SystemLackError
from sockhop.kernel._libbpf import lib
from sockhop.kernel.maps import U32, U64, Map
from sockhop.kernel.namespaces import Namespace, NamespaceGone, entered
from sockhop.kernel.objects import BpfObject, object_path
from sockhop.kernel.probe import Lack, Prober
from sockhop.kernel.syscall import check

__all__ = ["IteratorMethod", "has_sock_destroy"]

_PROGRAMS = {socket.IPPROTO_TCP: "sockhop_end_tcp", socket.IPPROTO_UDP: "sockhop_end_udp"}


class IteratorMethod:
    """Looks at each socket of a namespace while the kernel has it locked, and ends it at once.

    One iterator link for each protocol is kept, and opened anew in every namespace.
    """

    name = "iterator"
    protocols = frozenset(_PROGRAMS)

    def __init__(self, pins: Path, *, path: Path | None = None) -> None:
        """*path*: another object file, for tests. It is loaded by prepare(), or when needed."""
        self._pins = pins
        self._path = path or object_path("sever")
        self._stack = ExitStack()
        self._links: dict[int, int] = {}

    def close(self) -> None:
        """Unload what has been loaded."""
        self._stack.close()
        self._links = {}

    def prepare(self) -> None:
        """Load the programs, so that the first socket to end need not wait for that."""
        if self._links:
            return
        if not has_sock_destroy():  # the programs would find it missing and do nothing
            raise SystemLackError(
                "the kernel cannot end sockets from iterators: it has no bpf_sock_destroy",
                hint="end them by netlink",
            )
        with ExitStack() as stack:
            programs = BpfObject(self._path, pins=map_directory(self._pins))
            stack.callback(programs.close)
            layouts = programs.layouts
            self._records = SocketRecords(programs)
            pairs, named = (os.dup(programs.map_fd(name)) for name in ("pairs", "named"))
            self._pairs = stack.enter_context(Map(pairs, layouts.codec(Pair, "pair"), U32))
            ends = layouts.codec(SocketEnds, "socket_ends")
            self._named = stack.enter_context(Map(named, U64, ends))
            links = {}
            for protocol, program in _PROGRAMS.items():
                link = lib.sockhop_iter_link(programs.program(program), -1)
                links[protocol] = check(link, f"linking {program}")
                stack.callback(os.close, links[protocol])
            self._links = links
            self._stack = stack.pop_all()

    def end_pairs(
        self, pairs: Set[Pair], known: Mapping[int, BackendRecord], places: Iterable[Namespace]
    ) -> list[Outcome]:
        """End the sockets that are with one of *pairs*, in *places*: one pass.

        *known*: their backends by id, those that are still in the maps.
        """
        self.prepare()
        protocols = set(_PROGRAMS)
        if all(pair.backend in known for pair in pairs):
            protocols = {record.protocol for record in known.values()}
        outcomes: list[Outcome] = []
        with held(self._pairs, pairs):
            for place in places:
                with suppress(NamespaceGone), entered(place):
                    for protocol in protocols:
                        outcomes += self._end(protocol)
        return outcomes

    def end_sockets(self, sockets: Sequence[Socket], place: Namespace) -> list[Outcome]:
        """End these sockets of a namespace; one outcome for each. NamespaceGone where it is."""
        self.prepare()
        ended: dict[int, Outcome] = {}
        size = self._named.max_entries
        with entered(place):
            for first in range(0, len(sockets), size):
                some = sockets[first : first + size]
                with self._naming(some):
                    for protocol in {each.protocol for each in some}:
                        ended.update((each.socket.cookie, each) for each in self._end(protocol))
        return [ended.get(each.cookie, Outcome(each, Action.GONE)) for each in sockets]

    @contextmanager
    def _naming(self, sockets: Sequence[Socket]) -> Iterator[None]:
        try:
            self._named.update_many((each.cookie, SocketEnds(*_ends(each))) for each in sockets)
            yield
        finally:
            self._named.delete_many(each.cookie for each in sockets)

    def _end(self, protocol: int) -> list[Outcome]:
        """Run an iterator in this thread's namespace."""
        data = read_iterator(self._links[protocol], _PROGRAMS[protocol])
        outcomes = {}
        for each, result in self._records.results(data):  # of one socket, the last counts
            reason = f"bpf_sock_destroy: {os.strerror(-result)}" if result else ""
            action = Action.REFUSED if result else Action.SEVERED
            outcomes[each.cookie] = Outcome(each, action, reason)
        return list(outcomes.values())


def has_sock_destroy() -> bool:
    """Whether the kernel lets an iterator end sockets."""
    with Prober() as prober:
        try:
            prober.sock_destroy()
        except Lack:
            return False
    return True


def _ends(each: Socket) -> tuple[bytes, bytes, int, int]:
    return each.local_address, each.remote_address, each.local_port, each.remote_port
