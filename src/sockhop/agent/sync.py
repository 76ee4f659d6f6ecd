"""One synchronisation: sources -> desired -> plan -> map writes -> read-back."""

import gc
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import NamedTuple

from sockhop.agent.installer import Installer
from sockhop.agent.places import PlaceFinder
from sockhop.agent.plan import Plan, make_plan
from sockhop.agent.policies import PolicyKeeper, enforceable, policy_states
from sockhop.agent.splicing import Splicing
from sockhop.agent.state import AgentState
from sockhop.agent.target import Target, expand, with_redirects
from sockhop.agent.terminate import Terminator
from sockhop.errors import InputError, SockhopError
from sockhop.model import Desired, Service
from sockhop.sources.files import Loaded

__all__ = ["Garbage", "Synchronizer"]

_LOG = logging.getLogger(__name__)
_LINES = 20
_THAW_EVERY = 256


class _Applied(NamedTuple):
    """Services by name, and the places that they name by path."""

    services: dict[str, Service]
    places: dict[str, int]

    def differing(self, other: "_Applied") -> list[str]:
        """Return the names of the services that are other ones in *other*, or only in one."""
        # A source hands out the same object where nothing differs.
        services = self.services
        changed = [
            name
            for name, service in other.services.items()
            if (before := services.get(name)) is not service and before != service
        ]
        return changed + [name for name in services if name not in other.services]


class Garbage:
    """The garbage collector, kept from objects that are many, stay, and are no part of a cycle."""

    def __init__(self) -> None:
        self._times = 0

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Run without it: it would take half of the time; nor does it look at them afterwards.

        What is garbage by then, or becomes it, would be kept too: now and then it looks at all.
        """
        gc.disable()
        try:
            yield
        finally:
            self._times += 1
            if self._times % _THAW_EVERY == 0:
                gc.unfreeze()
                gc.collect()
            gc.freeze()
            gc.enable()


def _as_it_is(loaded: Loaded) -> Loaded:
    return loaded


class Synchronizer:
    """Brings what is installed in line with the sources, and notes in `state` how that went."""

    def __init__(
        self,
        load: Callable[[], Loaded],
        installer: Installer,
        policies: PolicyKeeper,
        state: AgentState,
        home: int,
        terminator: Terminator | None = None,
    ) -> None:
        """*load* reads the sources; *home* is the netns cookie in which loopback holds.

        *terminator* is told of each change; without it live sockets stay as they are.
        """
        self._load = load
        self.mark: Callable[[Loaded], Loaded] = _as_it_is
        """Adds what is known apart from the sources, also while these are broken."""
        self._good: Loaded | None = None
        self._installer = installer
        self._policies = policies
        self._state = state
        self._home = home
        self._terminator = terminator
        self._applied: _Applied | None = None
        self._garbage = Garbage()
        self.places = PlaceFinder()
        self.splicing: Splicing | None = None

    def begin(self, first: Loaded) -> None:
        """Apply what the sources said first; raise SockhopError as :meth:`apply` does."""
        self._good = first
        marked = self.mark(first)
        self.note_source(marked)
        self.apply(marked)
        self._state.synced_at = time.time()

    def run(self) -> bool:
        """Read the sources and apply them; on an error, which is said, the last good state.

        Return whether what is installed is what the sources say.
        """
        begin = time.monotonic()
        try:
            good = self._good = self._load()
        except InputError as error:
            if str(error) != self._state.source.error:
                _LOG.error("the last good state stays in force: %s", error)
            self._state.failed(str(error))
            if self._good:
                self._try(self.mark(self._good))
            return False
        marked = self.mark(good)
        self.note_source(marked)
        if not self._try(marked):
            return False
        self._state.synced_at = time.time()
        self._state.sync_seconds = time.monotonic() - begin
        _LOG.debug("synchronised in %.0f ms", self._state.sync_seconds * 1e3)
        return True

    def _try(self, loaded: Loaded) -> bool:
        """Apply what was loaded; where the kernel does not take it, say so."""
        try:
            self.apply(loaded)
        except SockhopError as error:
            if str(error) != self._state.sync_error:
                _LOG.error("not applied: %s", error)
            self._installer.read()  # what was written before it failed is there
            if self._terminator:
                self._terminator.begin(applied=False)
            self._state.sync_error = str(error)
            return False
        return True

    def apply(self, loaded: Loaded) -> Plan:
        """Apply what was loaded; raise SockhopError where the kernel does not take it."""
        with self._garbage.kept():
            return self._apply(loaded)

    def _apply(self, loaded: Loaded) -> Plan:
        state, installer = self._state, self._installer
        meant = enforceable(loaded.desired)
        places = self.places.find(with_redirects(meant))
        desired = with_redirects(meant, places)
        wanted = _Applied({service.name: service for service in desired.services}, places)
        # Until this has gone well, the next plan has to look at all that is installed.
        applied, self._applied = self._applied, None
        plan = self._plan(applied, wanted)
        changes = list(islice(plan.changes(installer.installed), _LINES))
        lines = [change.line(self._home) for change in changes if change.is_met]
        if self._terminator:
            self._terminator.prepare(plan, wanted.services)
        try:
            state.generation = installer.apply(plan)
        except SockhopError:
            # A service for which there is no room must not keep a denial from being in force.
            self._enforce(meant, desired)
            raise
        if self._terminator:
            self._terminator.begin()
        for line in lines:
            _LOG.info("%s", line)
        if more := plan.frontends - len(changes):
            _LOG.info("... and %d more frontends", more)
        state.services = len(loaded.desired.services)
        state.frontends = sum(len(service.frontends) for service in loaded.desired.services)
        state.backends = len(installer.installed.members)
        self._enforce(meant, desired)
        state.sync_error = ""
        self._applied = wanted
        if self.splicing:
            self.splicing.apply(desired, installer.installed.services)
        return plan

    def _enforce(self, meant: Desired, desired: Desired) -> None:
        self._policies.apply(desired, self._home, self.places)
        self._state.policies = policy_states(meant, self.places)

    def _plan(self, applied: "_Applied | None", wanted: "_Applied") -> Plan:
        """Compare what is *wanted* with what is installed, or only what differs from *applied*."""
        installed = self._installer.installed
        if applied is None or applied.places != wanted.places:
            return make_plan(self._expand(wanted, wanted.services), installed)
        names = applied.differing(wanted)
        before, after = self._expand(applied, names), self._expand(wanted, names)
        return make_plan(after, installed.part(before, after))

    def _expand(self, state: "_Applied", names: Iterable[str]) -> Target:
        services = tuple(state.services[name] for name in names if name in state.services)
        return expand(Desired(services), self._home, state.places)

    def note_source(self, loaded: Loaded) -> None:
        """Note that the sources are good, and log what is new among their warnings."""
        source = self._state.source
        if source.error:
            _LOG.info("the sources are good again")
        known = set(source.warnings)
        for warning in loaded.warnings:
            if warning not in known:
                _LOG.warning("%s", warning)
        source.error, source.error_at, source.good_at = "", 0.0, time.time()
        source.warnings = list(loaded.warnings)
