"""Moves one connected UDP socket that this process has a duplicate of."""

import errno
import random
import socket
from contextlib import suppress
from enum import StrEnum
from typing import NamedTuple, TypeAlias

from sockhop.datapath.balancer import BalanceMaps
from sockhop.datapath.candidates import Candidate, Fitting, Traits, active_backends
from sockhop.datapath.memory import SocketMemory
from sockhop.datapath.outcome import Action
from sockhop.datapath.records import FrontendKey, Move, Provenance, Watch
from sockhop.datapath.sockets import Socket
from sockhop.kernel.cgroups import cgroups_above
from sockhop.kernel.cookies import socket_cookie
from sockhop.kernel.netns import socket_netns_cookie
from sockhop.model import endpoint, pack_address, unpack_address

__all__ = ["Kept", "Mover", "Obstacle"]

_ATTEMPTS = 3
_TIMES_BACK = 100
_End: TypeAlias = tuple[bytes, int]


class Obstacle(StrEnum):
    """Why a socket was not moved: a word for counters."""

    NONE = "moved"
    KIND = "kind"
    """It is no connected UDP socket."""
    NO_DESCRIPTOR = "no_descriptor"
    """No process has a descriptor of it: io_uring's own, the kernel's, one on its way."""
    REFUSED = "refused"
    """The kernel does not hand it out: no CAP_SYS_PTRACE, seccomp, Yama."""
    CLOSED = "closed"
    """Its descriptor was closed, or its process ended, meanwhile."""
    ELSEWHERE = "elsewhere"
    """The program has connected it to something else meanwhile."""
    NO_SERVICE = "no_service"
    """What it dialled is no frontend any more."""
    NO_BACKEND = "no_backend"
    """No other backend is active. It stays, and can be moved when there is one."""
    SOURCE = "source"
    """Every other backend would need another source address than it has."""
    CONNECT = "connect"
    """The kernel does not connect it: no route, a policy."""
    NOT_PUT_BACK = "not_put_back"
    """The program connected or disconnected it in the very moment of the move, and it is not so."""
    NOT_BALANCED = "not_balanced"
    """It is connected, but no hook of ours has balanced it."""
    UNMANAGED = "unmanaged"
    """It was not balanced before, and what it is connected to is no frontend for it."""
    BYPASS = "bypass"
    """Bypass is on, so nothing would balance it."""

    @property
    def severs(self) -> bool:
        """Whether a socket that was not moved for this reason is severed instead."""
        return self not in _LEAVES

    @property
    def action(self) -> Action:
        """What this makes of a socket that is not severed."""
        return Action.GONE if self is Obstacle.ELSEWHERE else Action.LEFT


_LEAVES = frozenset({Obstacle.ELSEWHERE, Obstacle.NO_BACKEND, Obstacle.UNMANAGED, Obstacle.BYPASS})


class Kept(Exception):
    """The socket was not moved. `now`: it as it is now, if it is not as it was."""

    def __init__(self, obstacle: Obstacle, reason: str, *, now: Socket | None = None) -> None:
        super().__init__(reason)
        self.obstacle = obstacle
        self.reason = reason
        self.now = now


class _Seen(NamedTuple):
    """A socket as it is now. `dialled`: what it is connected to again, a frontend or not.

    `backend`: the id of the one that it is with, 0 if it is with none. `port`: its local one.
    """

    target: Socket
    own: socket.socket
    port: int
    since: int
    backend: int
    dialled: _End
    active: list[Candidate] | None
    traits: Traits


class Mover:
    """Moves sockets, one after the other: a batch, in which services are read once."""

    def __init__(
        self,
        maps: BalanceMaps,
        memory: SocketMemory,
        fitting: Fitting,
        *,
        thread: int,
        direct: bool,
        dry: bool,
    ) -> None:
        """*thread*: the id of this one in the first namespace of process ids.

        *direct*: a socket goes to what it dialled even if that is no frontend any more. *dry*:
        move() does everything but connect the socket.
        """
        self._maps, self._memory, self._fitting = maps, memory, fitting
        self._thread, self._direct, self._dry = thread, direct, dry
        self._read: dict[tuple[_End, int, int], list[Candidate] | None] = {}

    def move(self, target: Socket, own: socket.socket, *, bound: bool) -> str:
        """Move the socket, of which *own* is a duplicate; return what was done, for people.

        *bound*: its program has bound it to its address. Raises Kept where it stays.
        """
        for attempt in range(_ATTEMPTS):
            seen = self._look(target, own, bound)
            fits = self._choose(seen)
            if self._dry:
                return _there(fits)
            # Where the hook would choose among just these, it does.
            free = seen.active is None or len(fits) == len(seen.active)
            try:
                self._connect(seen, 0 if free else _by_weight(fits).backend)
            except OSError as error:
                # The hook's answer where the backend that was chosen has just gone.
                again = error.errno == errno.EHOSTUNREACH and not self._watch(seen).through
                if not again or attempt == _ATTEMPTS - 1:
                    raise self._refusal(seen, error) from None
                self._read.clear()
            else:
                return self._confirm(seen)
        raise AssertionError

    def _look(self, target: Socket, own: socket.socket, bound: bool) -> _Seen:
        if not _is_same(own, target):
            raise Kept(Obstacle.CLOSED, "its descriptor is another socket's now")
        origin = self._recall(target, own)
        if _since(origin) != _since(target.origin):
            raise Kept(Obstacle.ELSEWHERE, "its program has connected it again")
        backend = _backend(target, origin)
        dialled = target.remote_address, target.remote_port
        if origin and backend:
            dialled = origin.frontend_address, origin.frontend_port
        active = self._active(dialled, socket_netns_cookie(own), target.cgroup)
        if active is None and not backend:
            raise Kept(Obstacle.UNMANAGED, "it is not balanced, and its peer is no frontend")
        if active is None and not self._direct:
            raise Kept(Obstacle.NO_SERVICE, f"{endpoint_of(dialled)} is no frontend any more")
        traits = Traits.of(own, netns=target.netns, local=target.local_address, bound=bound)
        port = own.getsockname()[1]
        return _Seen(target, own, port, _since(origin), backend, dialled, active, traits)

    def _active(self, dialled: _End, netns_cookie: int, cgroup: int) -> list[Candidate] | None:
        """Return the active backends of a frontend, None where there is none; read once."""
        place = dialled, netns_cookie, cgroup
        if place not in self._read:
            key = FrontendKey(dialled[0], 0, dialled[1], socket.IPPROTO_UDP)
            found = self._maps.find_for(key, netns_cookie, cgroups_above(cgroup))
            self._read[place] = active_backends(self._maps, found[1]) if found else None
        return self._read[place]

    def _choose(self, seen: _Seen) -> list[Candidate]:
        """Return the backends that it may go to: others than its own, that fit."""
        active = [Candidate(0, *seen.dialled)] if seen.active is None else seen.active
        others = [each for each in active if not each.backend or each.backend != seen.backend]
        if not others:
            raise Kept(Obstacle.NO_BACKEND, "no other backend is active")
        fits = [each for each in others if self._fits(seen, each.address)]
        if not fits:
            raise Kept(Obstacle.SOURCE, self._misfit(seen, others[0]))
        return fits

    def _fits(self, seen: _Seen, to: bytes) -> bool:
        return self._fitting.source(seen.own, seen.traits, to) == seen.traits.local

    def _misfit(self, seen: _Seen, other: Candidate) -> str:
        to, local = endpoint_of(other[1:3]), unpack_address(seen.traits.local)
        needed = self._fitting.source(seen.own, seen.traits, other.address)
        if needed is None:
            return f"there is no route from its source address {local} to {to}"
        return f"its source address is {local}, and {to} needs {unpack_address(needed)}"

    def _connect(self, seen: _Seen, backend: int) -> None:
        target = seen.target
        try:
            self._dial(seen, (target.remote_address, target.remote_port), backend)
            self._give_way(seen)
        finally:
            self._maps.moves.delete(target.cookie)

    def _dial(self, seen: _Seen, peer: _End, backend: int = 0) -> None:
        """Connect it, if *peer* is its peer until then; a second time: to where its program did."""
        move = Move(peer[0], seen.since, self._thread, backend, peer[1])
        self._maps.moves.set(seen.target.cookie, move)
        seen.own.connect(_sockaddr(seen.own, seen.dialled))

    def _watch(self, seen: _Seen) -> Watch:
        """What its program has done with it since the hooks watch it."""
        return self._maps.watched.get(seen.target.cookie) or Watch()

    def _give_way(self, seen: _Seen) -> None:
        """Undo the move if its program has connected or disconnected it while we connected it.

        What it dialled is noted, see bpf/move.h. No hook runs where it disconnects, but the local
        port goes with the peer if the kernel had chosen it (__udp_disconnect()). To disconnect it
        as well could meet its program's next connect(): Kept has it severed while it is there.
        """
        port, now, said = seen.port, 0, "its program connects it again and again"
        for _ in range(_TIMES_BACK):
            now = seen.own.getsockname()[1]
            if now == port and not self._watch(seen).noted:
                break
            # The note last: without one, the peer is not the program's.
            peer, watch = self._peer(seen), self._watch(seen)
            if peer is None or (watch.noted and peer == (watch.address, watch.port)):
                break
            if not watch.noted and now:
                said = "its program has disconnected it meanwhile"
                raise Kept(Obstacle.NOT_PUT_BACK, said, now=_at(seen, peer, now))
            if not watch.noted:
                _bind(seen.own)
                continue
            port = now
            try:
                self._dial(seen, peer)
            except OSError as error:
                said = f"its program has connected it meanwhile; again, {_says(error)}"
                # The hook's answer where its program has done something once more.
                if error.errno not in (errno.ECANCELED, errno.EPERM):
                    raise Kept(Obstacle.NOT_PUT_BACK, said, now=_at(seen, peer, now)) from None
        else:
            there = self._peer(seen)
            raise Kept(Obstacle.NOT_PUT_BACK, said, now=there and _at(seen, there, now))
        if self._watch(seen).dials:
            raise Kept(Obstacle.ELSEWHERE, "its program has connected it elsewhere")
        if now != port:
            raise Kept(Obstacle.ELSEWHERE, "its program has disconnected it")

    def _peer(self, seen: _Seen) -> _End | None:
        """What it is really connected to; getpeername() gives the frontend instead of a backend."""
        name, origin = _peer_name(seen.own), self._recall(seen.target, seen.own)
        if origin and name == (origin.frontend_address, origin.frontend_port):
            return origin.backend_address, origin.backend_port
        return name

    def _refusal(self, seen: _Seen, error: OSError) -> Kept:
        # Before Linux 5.18 a hook can only say EPERM.
        elsewhere = error.errno == errno.EPERM and self._has_connected(seen)
        if error.errno == errno.ECANCELED or elsewhere:
            return Kept(Obstacle.ELSEWHERE, "its program has connected it elsewhere")
        return Kept(Obstacle.CONNECT, _says(error))

    def _has_connected(self, seen: _Seen) -> bool:
        since = _since(self._recall(seen.target, seen.own))
        return since != seen.since or bool(self._watch(seen).dials)

    def _recall(self, target: Socket, own: socket.socket) -> Provenance | None:
        return self._memory.provenance(own) or self._memory.provenance_by_cookie(target.cookie)

    def _confirm(self, seen: _Seen) -> str:
        """Look whether the hook has balanced it, and take away the error of the old backend.

        That is an ICMP answer to what the program sent there; its next send() would fail.
        """
        error = seen.own.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        after = self._recall(seen.target, seen.own)
        taken = f", {errno.errorcode.get(error, error)} taken away" if error else ""
        if _peer_name(seen.own) != seen.dialled:
            raise Kept(Obstacle.ELSEWHERE, "its program has connected it elsewhere")
        if after is None or after.since == seen.since:
            if seen.active is None:
                return f"to {endpoint_of(seen.dialled)} itself{taken}"
            if not seen.backend:
                raise Kept(Obstacle.UNMANAGED, "the service is not for this socket")
            reason = f"no hook has balanced it; it is at {endpoint_of(seen.dialled)} now"
            raise Kept(Obstacle.NOT_BALANCED, reason, now=_at(seen, seen.dialled, seen.port))
        there = after.backend_address, after.backend_port
        if not self._fits(seen, there[0]):  # the service has just changed
            other = Candidate(after.backend, *there)
            raise Kept(Obstacle.SOURCE, self._misfit(seen, other), now=_at(seen, there, seen.port))
        return f"to {endpoint_of(there)}{taken}"


def endpoint_of(end: _End) -> str:
    """Return packed address and port as text."""
    return endpoint(unpack_address(end[0]), end[1])


def _by_weight(candidates: list[Candidate]) -> Candidate:
    return random.choices(candidates, [each.weight for each in candidates])[0]


def _there(candidates: list[Candidate]) -> str:
    if len(candidates) > 1:
        return f"to one of {len(candidates)} backends"
    return f"to {endpoint_of(candidates[0][1:3])}"


def _at(seen: _Seen, peer: _End, port: int) -> Socket:
    return seen.target._replace(remote_address=peer[0], remote_port=peer[1], local_port=port)


def _bind(own: socket.socket) -> None:
    """Have the kernel choose a local port if it has none: only then anybody finds it.

    The kernel does so before it looks how long a datagram is (inet_sendmsg()).
    """
    with suppress(OSError):
        own.send(bytes(1 << 16), socket.MSG_DONTWAIT)


def _says(error: OSError) -> str:
    name = errno.errorcode.get(error.errno or 0, "")
    return f"connect() says {error.strerror} ({name})"


def _is_same(own: socket.socket, target: Socket) -> bool:
    return socket_cookie(own) == target.cookie


def _since(origin: Provenance | None) -> int:
    return origin.since if origin else 0


def _backend(target: Socket, origin: Provenance | None) -> int:
    """The backend of *origin* that the socket is with: after a failed connect the one before."""
    peer = target.remote_address, target.remote_port
    if origin is None:
        return 0
    if peer == (origin.backend_address, origin.backend_port):
        return origin.backend
    if peer == (origin.previous_address, origin.previous_port):
        return origin.previous_backend
    return 0


def _sockaddr(own: socket.socket, to: _End) -> tuple[str, int]:
    if own.family == socket.AF_INET:
        return unpack_address(to[0]), to[1]
    return socket.inet_ntop(socket.AF_INET6, to[0]), to[1]


def _peer_name(own: socket.socket) -> _End | None:
    """What getpeername() gives: through our hook the frontend, if it is with the backend."""
    try:
        address, port, *_ = own.getpeername()
    except OSError:
        return None
    return pack_address(address.partition("%")[0]), port
