"""Finds live sockets that policies forbid, and moves those that redirects concern.

When what is in force has changed, it looks at the sockets of all network namespaces; and a little
later again, since a connect() that a hook had let pass may not have got its place in the kernel's
tables yet.
"""

import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple, TypeAlias

from sockhop.agent.forbidden import Looker, Scene, forbidden, misplaced
from sockhop.agent.installer import Installer
from sockhop.agent.plan import InstalledEntry
from sockhop.agent.policies import PolicyKeeper
from sockhop.agent.policy_table import PolicyTable
from sockhop.agent.record import Cause, Recorder
from sockhop.agent.target import is_redirect
from sockhop.datapath.balancer import BalanceMaps
from sockhop.datapath.outcome import Action
from sockhop.datapath.records import FrontendKey, Setting
from sockhop.datapath.resteer import Resteerer, Sever
from sockhop.datapath.sockets import Socket
from sockhop.errors import SockhopError

__all__ = ["Deny", "Enforcer"]

_LOG = logging.getLogger(__name__)
_LOOKS = (0.1, 1.0)
"""Seconds between looks; the first comes at once."""

_RETRY = 30.0

Deny: TypeAlias = Callable[[Iterable[tuple[Socket, str]], int], None]
"""Takes all sockets that policies forbid now, each with a policy's name, and the change."""


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
        resteerer: Resteerer,
        sever: Sever,
        *,
        maps: BalanceMaps,
    ) -> None:
        """*sever* ends sockets that cannot be moved."""
        self.policies = policies
        self._installer = installer
        self._looker = looker
        self._resteerer = resteerer
        self._sever = sever
        self._maps = maps
        self._seen = _Force(PolicyTable({}, (), ()), {})
        self._redirects: set[int] = set()
        """The ids of services that stand for redirects, or stood for one."""
        self._change = 0
        self._looks = 0
        self._next = math.inf

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
        self._next = at + _LOOKS[self._looks] if self._looks < len(_LOOKS) else math.inf
        self._looks += 1
        return self._next

    def _notice(self, at: float) -> None:
        """Begin to look where what is in force has changed."""
        services = self._installer.installed.services
        self._redirects |= {number for name, number in services.items() if is_redirect(name)}
        force = _Force(self.policies.table, self._redirected())
        if force == self._seen:
            return
        self._seen = force
        self._change = self._maps.setting(Setting.GENERATION)
        self._looks, self._next = 0, at

    def _redirected(self) -> Mapping[FrontendKey, InstalledEntry]:
        if not self._maps.setting(Setting.REDIRECTS):
            return {}
        entries = self._installer.installed.entries
        return {key: entry for key, entry in entries.items() if key.layer}

    def _look(self, deny: Deny, recorder: Recorder) -> None:
        if not self._seen.table and not self._redirects:
            deny((), self._change)
            return
        frontends = {(key.address, key.port) for key in self._seen.redirects}
        redirects = bool(self._redirects)
        scene = self._looker.look(self._seen.table, frontends, balanced=redirects)
        if self._looks == 0 and scene.unknown:
            _LOG.info("sockets left, since nobody knows their cgroup: %d", scene.unknown)
        found = forbidden(scene, self._seen.table)
        dialled = self._looker.dialled(each.socket for each in found)
        deny([each for each in found if each.socket.cookie in dialled], self._change)
        if redirects and self._move(scene, recorder):
            self._looks = 0  # its frontend may have changed while it was moved

    def _move(self, scene: Scene, recorder: Recorder) -> bool:
        """Move, or end, the sockets that redirects concern; whether there were any."""
        found = misplaced(scene, self._maps, self._redirects)
        dialled = self._looker.dialled(found)
        done = self._resteerer.resteer(
            (each for each in found if each.cookie in dialled), self._sever, direct=True
        )
        recorder.record((outcome, self._cause(outcome.socket)) for outcome in done)
        return any(each.action in (Action.SEVERED, Action.RESTEERED) for each in done)

    def _cause(self, each: Socket) -> Cause:
        was = each.pair is not None and each.pair.service in self._redirects
        reason = "its redirect is another one, or gone" if was else "it is redirected"
        return Cause("redirect", reason, "", "resteer", self._change)
