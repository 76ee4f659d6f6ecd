"""Moves connected UDP sockets of other processes to another backend.

This process connects a duplicate of the socket, and so the socket, to its frontend again: the hook
chooses. The program keeps descriptor, local port and options, and its next send() arrives.
"""

import errno
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from sockhop.datapath.balancer import BalanceMaps, map_directory
from sockhop.datapath.candidates import Fitting
from sockhop.datapath.memory import SocketMemory
from sockhop.datapath.moving import Kept, Mover, Obstacle
from sockhop.datapath.outcome import Action, Outcome
from sockhop.datapath.owners import Owner, Owners
from sockhop.datapath.records import Setting, Watch
from sockhop.datapath.sockets import Socket
from sockhop.errors import SystemLackError
from sockhop.kernel.bpffs import one_at_a_time
from sockhop.kernel.procfs import borrowed, find_holders
from sockhop.kernel.syscall import KernelError, grace_period

__all__ = ["MoveOutcome", "Obstacle", "Resteerer", "Sever"]

Sever: TypeAlias = Callable[[Sequence[Socket]], Iterable[Outcome]]
"""Ends exactly the sockets that it is given."""

_SECOND_LOOK = 0.02  # s: by then a descriptor that was being handed over has arrived


@dataclass(frozen=True, slots=True)
class MoveOutcome(Outcome):
    """What became of a socket that was to be moved, and what kept it from being moved."""

    obstacle: Obstacle = Obstacle.NONE


class Resteerer:
    """Moves sockets, and counts what kept others from being moved. Use as a context manager."""

    def __init__(self, pins: Path) -> None:
        """Open the maps below *pins*; NotInstalled where there are none."""
        self._directory = map_directory(pins)
        self.obstacles: Counter[Obstacle] = Counter()
        """How many sockets there were, by obstacle; NONE: those that were moved."""
        with ExitStack() as stack:
            self._maps = stack.enter_context(BalanceMaps(pins))
            self._memory = stack.enter_context(SocketMemory(pins))
            self._owners = _load_owners(stack)
            with self.watched(()):
                pass  # if one was killed while it moved sockets, the hooks still look
            self._stack = stack.pop_all()

    def close(self) -> None:
        """Close everything."""
        self._stack.close()

    def __enter__(self) -> "Resteerer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def resteer(
        self,
        sockets: Iterable[Socket],
        sever: Sever | None,
        *,
        direct: bool = False,
        dry: bool = False,
    ) -> list[MoveOutcome]:
        """Move each of *sockets* to another backend of what it dialled, or *sever* it.

        Without *sever* it stays. A socket without provenance is connected again to the peer that
        it has, if that is a frontend now. *direct*: where what a socket dialled is no frontend any
        more, it goes to that address itself, as when a redirect is deleted. While no other backend
        is active it stays where it is; one that its program has connected elsewhere is left alone.
        *dry*: look what would be done, and count nothing.
        """
        wanted = {each.cookie: each for each in sockets}
        kept: dict[int, Kept] = {}
        done: dict[int, str] = {}
        if self._maps.setting(Setting.BYPASS):
            kept = dict.fromkeys(wanted, Kept(Obstacle.BYPASS, "bypass is on"))
        else:
            every, size = list(wanted.values()), self._maps.watched.max_entries
            for first in range(0, len(every), size):
                batch = every[first : first + size]
                with nullcontext() if dry else self.watched(each.cookie for each in batch):
                    self._move_all(batch, done, kept, direct=direct, dry=dry)
        if not dry:
            self.obstacles[Obstacle.NONE] += len(done)
            self.obstacles.update(reason.obstacle for reason in kept.values())
        return _outcomes(wanted, done, kept, sever)

    def _move_all(
        self,
        batch: Sequence[Socket],
        done: dict[int, str],
        kept: dict[int, Kept],
        *,
        direct: bool,
        dry: bool,
    ) -> None:
        owners = self.find_owners(batch)
        with self.mover(direct=direct, dry=dry) as mover:
            for each in batch:
                try:
                    done[each.cookie] = _move(mover, each, owners.get(each.cookie, []))
                except Kept as reason:
                    kept[each.cookie] = reason

    @contextmanager
    def mover(self, *, direct: bool = False, dry: bool = False) -> Iterator[Mover]:
        """Yield what moves sockets that are :meth:`watched`, after :meth:`find_owners` has run in
        this thread: that tells the thread its own number."""
        thread = self._owners.reader if self._owners else threading.get_native_id()
        with Fitting() as fitting:
            yield Mover(self._maps, self._memory, fitting, thread=thread, direct=direct, dry=dry)

    @contextmanager
    def watched(self, cookies: Iterable[int]) -> Iterator[None]:
        """While the body runs, the hooks look who connects these sockets, see bpf/move.h.

        It is to begin well before they are connected: a program's connect() whose hook has run
        before, and that connects only then, is noticed only if it went to a frontend.
        """
        with one_at_a_time(self._directory):
            self._forget()  # what one that was killed has left
            self._maps.watched.update_many((cookie, Watch()) for cookie in cookies)
            self._maps.settings.set(Setting.MOVING, 1)
            try:
                yield
            finally:
                self._forget()

    def _forget(self) -> None:
        moves, watched = self._maps.moves, self._maps.watched
        self._maps.settings.set(Setting.MOVING, 0)
        if left := watched.keys():
            grace_period()  # or a hook notes something in what is another socket's entry by then
            watched.delete_many(left)
        moves.delete_many(moves.keys())

    def find_owners(self, targets: Sequence[Socket]) -> dict[int, list[Owner]]:
        """Return the processes that have a descriptor, by the sockets' cookies."""
        found = self._look_for(targets)
        if missing := [each for each in targets if each.cookie not in found]:
            time.sleep(_SECOND_LOOK)
            found |= self._look_for(missing)
        return found

    def _look_for(self, targets: Sequence[Socket]) -> dict[int, list[Owner]]:
        if self._owners:
            return self._owners.find(each.cookie for each in targets)
        holders = find_holders(each.inode for each in targets if each.inode)
        return {
            each.cookie: [Owner(holder, bound=False) for holder in holders[each.inode]]
            for each in targets
            if each.inode in holders
        }


def _move(mover: Mover, target: Socket, owners: Sequence[Owner]) -> str:
    """Move *target* through the first of its owners that lets us; Kept where none does."""
    if target.protocol != socket.IPPROTO_UDP or target.state_name != "ESTAB":
        raise Kept(Obstacle.KIND, "it is no connected UDP socket")
    kept = Kept(Obstacle.NO_DESCRIPTOR, "no process has a descriptor of it")
    for owner in owners:
        with ExitStack() as stack:
            try:
                own = stack.enter_context(borrowed(owner.holder))
            except KernelError as error:
                kept = _refusal(owner, error)
                continue
            return mover.move(target, own, bound=owner.bound)
    raise kept


def _refusal(owner: Owner, error: KernelError) -> Kept:
    if error.errno in (errno.ESRCH, errno.EBADF):
        return Kept(Obstacle.CLOSED, f"{owner.holder} has closed it")
    return Kept(Obstacle.REFUSED, f"{owner.holder} may not be asked: {error.message}")


def _outcomes(
    wanted: Mapping[int, Socket],
    done: Mapping[int, str],
    kept: Mapping[int, Kept],
    sever: Sever | None,
) -> list[MoveOutcome]:
    """Sever what could not be moved, and return what became of each."""
    ended = {}
    if sever and (hopeless := [n for n, reason in kept.items() if reason.obstacle.severs]):
        now = [kept[cookie].now or wanted[cookie] for cookie in hopeless]
        ended = {each.socket.cookie: each for each in sever(now)}
    return [
        MoveOutcome(target, Action.RESTEERED, done[cookie])
        if cookie in done
        else _kept(target, kept[cookie], ended.get(cookie))
        for cookie, target in wanted.items()
    ]


def _kept(target: Socket, reason: Kept, end: Outcome | None) -> MoveOutcome:
    action = end.action if end else reason.obstacle.action
    text = f"not moved: {reason.reason}"
    if end and end.action not in (Action.SEVERED, Action.GONE):
        text += f"; not severed: {end.reason}"
    return MoveOutcome(target, action, text, reason.obstacle)


def _load_owners(stack: ExitStack) -> Owners | None:
    """Without it /proc tells the same, not at once and not if a program has bound its socket."""
    try:
        return stack.enter_context(Owners())
    except SystemLackError:
        return None
