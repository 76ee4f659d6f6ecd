"""Finds live sockets that policies forbid, and moves those that redirects concern.

When what is in force has changed, it looks at the sockets of all network namespaces; and a little
later again, since a connect() that a hook had let pass may not have got its place in the kernel's
tables yet.

Which sockets a redirect has served is known by the id of the service that stands for it. The ids
are kept with the orders: what is gone, or was gone when this agent started, may have left sockets.
"""

import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple, TypeAlias

from sockhop.agent.forbidden import Looker, Scene, forbidden, misplaced
from sockhop.agent.installer import Installer
from sockhop.agent.orders import Orders
from sockhop.agent.plan import InstalledEntry
from sockhop.agent.policies import PolicyKeeper
from sockhop.agent.policy_table import PolicyTable
from sockhop.agent.record import Cause, Recorder
from sockhop.agent.target import is_redirect
from sockhop.datapath.balancer import BalanceMaps
from sockhop.datapath.outcome import Action, Outcome
from sockhop.datapath.records import FrontendKey, Setting
from sockhop.datapath.sockets import Socket
from sockhop.errors import SockhopError

__all__ = ["Deny", "Enforcer", "Move"]

_LOG = logging.getLogger(__name__)
_LOOKS = (0.1, 1.0)
"""Seconds between looks; the first comes at once."""

_RETRY = 30.0

Deny: TypeAlias = Callable[[Iterable[tuple[Socket, str]], int], None]
"""Takes all sockets that policies forbid now, each with a policy's name, and the change."""


Move: TypeAlias = Callable[[Sequence[Socket]], Sequence[Outcome]]
"""Points sockets at what they have dialled, be it a frontend or not by now, or ends them."""


class _Force(NamedTuple):
    """What sockets are compared with: policies, and redirects by their frontends."""

    table: PolicyTable
    redirects: Mapping[FrontendKey, InstalledEntry]


class Enforcer:
    """Notices that policies or redirects are other ones, and sees to the sockets of before."""

    def __init__(
        self,
        installer: Installer,
        policies: PolicyKeeper,
        looker: Looker,
        move: Move,
        *,
        maps: BalanceMaps,
        orders: Orders,
    ) -> None:
        self.policies = policies
        self._installer = installer
        self._looker = looker
        self._move_there = move
        self._maps = maps
        self._orders = orders
        self._seen: _Force | None = None
        self._waits = False
        """Whether a socket that should be moved is where it was."""
        self._change = 0
        self._looks = 0
        self._next = math.inf
        self.note_redirects()

    def note_redirects(self) -> None:
        """Note which services stand for redirects now, before a change takes one away."""
        services = self._installer.installed.services
        self._orders.redirects |= {id_ for name, id_ in services.items() if is_redirect(name)}

    def run(self, deny: Deny, recorder: Recorder) -> float:
        """Look at the sockets if that is due; return when to come again (CLOCK_BOOTTIME)."""
        at = time.clock_gettime(time.CLOCK_BOOTTIME)
        self._notice(at)
        if at < self._next:
            return self._next
        try:
            self._look(deny, recorder)
        except SockhopError as error:
            _LOG.error("live sockets are as they were, another try follows: %s", error)
            self._next = at + _RETRY
            return self._next
        last = self._looks >= len(_LOOKS)
        self._next = self._rest(at) if last else at + _LOOKS[self._looks]
        self._looks += 1
        return self._next

    def _notice(self, at: float) -> None:
        """Begin to look where what is in force has changed."""
        self.note_redirects()
        force, change = self._force(), self._maps.setting(Setting.GENERATION)
        # Whoever waits may have a service, or another backend, by now.
        if force == self._seen and not (self._waits and change != self._change):
            return
        self._seen, self._change = force, change
        self._looks, self._next = 0, at

    def _rest(self, at: float) -> float:
        """Return when to look again after the last look at what is in force."""
        if self._waits:
            return at + _RETRY
        self._orders.redirects.intersection_update(self._installer.installed.services.values())
        return math.inf

    def _force(self) -> _Force:
        return _Force(self.policies.table, self._redirected())

    def _redirected(self) -> Mapping[FrontendKey, InstalledEntry]:
        if not self._maps.setting(Setting.REDIRECTS):
            return {}
        entries = self._installer.installed.entries
        return {key: entry for key, entry in entries.items() if key.layer}

    def _look(self, deny: Deny, recorder: Recorder) -> None:
        table, redirected = self._seen or self._force()
        redirects = bool(self._orders.redirects)
        if not table and not redirects:
            deny((), self._change)
            return
        frontends = {(key.address, key.port) for key in redirected}
        # The first look is for nearly all, at once; the next one follows at once for the others.
        scene = self._looker.look(table, frontends, balanced=redirects, quick=self._looks == 0)
        if self._looks == 0 and scene.unknown:
            _LOG.info("sockets left, since nobody knows their cgroup: %d", scene.unknown)
        found = forbidden(scene, table)
        dialled = self._looker.dialled(each.socket for each in found)
        deny([each for each in found if each.socket.cookie in dialled], self._change)
        if redirects and self._move(scene, recorder):
            self._looks = 0  # its frontend may have changed while it was moved

    def _move(self, scene: Scene, recorder: Recorder) -> bool:
        """Move, or end, the sockets that redirects concern; whether that was done to any."""
        found = misplaced(scene, self._maps, self._orders.redirects)
        dialled = self._looker.dialled(found)
        done = self._move_there([each for each in found if each.cookie in dialled])
        recorder.record((outcome, self._cause(outcome.socket)) for outcome in done)
        self._waits = any(each.action is Action.LEFT for each in done)
        return any(each.action in (Action.SEVERED, Action.RESTEERED) for each in done)

    def _cause(self, each: Socket) -> Cause:
        was = each.pair is not None and each.pair.service in self._orders.redirects
        reason = "its redirect is another one, or gone" if was else "it is redirected"
        return Cause("redirect", reason, "", "resteer", self._change)
