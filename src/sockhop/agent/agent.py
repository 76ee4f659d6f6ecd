"""`sockhop agent`: follows the sources and keeps the kernel in line with them."""

import asyncio
import logging
import math
import os
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import ExitStack, asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from socket import socket

import msgspec

from sockhop import __version__
from sockhop.agent.brake import Limits
from sockhop.agent.coexist import Coexistence, refuse_rivals
from sockhop.agent.health import HealthKeeper
from sockhop.agent.installer import Installer
from sockhop.agent.listening import api_listener, metrics_listeners
from sockhop.agent.notify import notify, watchdog_interval
from sockhop.agent.orders import now
from sockhop.agent.overrides import Overrides
from sockhop.agent.policies import PolicyKeeper
from sockhop.agent.rejections import RejectionLog
from sockhop.agent.splicing import SpliceOptions, Splicing
from sockhop.agent.state import AgentState, BackendRequest, HeldChange, Override, SourceState
from sockhop.agent.sync import Synchronizer
from sockhop.agent.terminate import Terminator, opened_terminator
from sockhop.agent.watching import Watching
from sockhop.datapath.balancer import Balancer, check_room, map_directory, remove_pins, survey
from sockhop.datapath.live_index import LiveIndex
from sockhop.datapath.sockets import Sockets
from sockhop.datapath.splicer import end_splicing
from sockhop.errors import SockhopError, SystemLackError
from sockhop.kernel.bpffs import lock_directory
from sockhop.kernel.cgroups import open_cgroup
from sockhop.kernel.netns import current_cookie
from sockhop.model import BackendState
from sockhop.sources.files import FileSource, Loaded
from sockhop.sources.watch import FileWatcher

__all__ = ["AgentOptions", "run_agent"]

_LOG = logging.getLogger(__name__)
_SETTLE = 0.01
"""Seconds from the first sign of a change to reading: an editor's write comes in parts."""
_COUNTERS_EVERY = 5.0
_CILIUM_EVERY = 2.0
_PLACES_EVERY = 2.0
_SWEEP_EVERY = 1.0
_AGAIN = 5.0
_RETRY, _RETRY_MOST = 2.0, 30.0
"""Seconds until what failed is tried again: at first, and after many failures."""
_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class AgentOptions(msgspec.Struct, frozen=True):
    """What `sockhop agent` was asked to do."""

    paths: tuple[Path, ...]
    cgroup: Path
    pins: Path
    api: Path
    metrics: str = ""
    node_name: str = ""
    detach_on_exit: bool = False
    settle_every: float = 30.0
    map_sizes: dict[str, int] = {}
    coexist: bool = False
    limits: Limits = Limits()
    splice: SpliceOptions = SpliceOptions()
    watch_every: float = 30.0


def run_agent(options: AgentOptions) -> None:
    """Run until SIGTERM or SIGINT. What is balanced stays so, unless `detach_on_exit`.

    InputError or SystemLackError where it cannot start; then nothing has changed.
    """
    sources = _Sources(options)
    first = sources.load()
    with ExitStack() as stack:
        cgroup = stack.enter_context(open_cgroup(options.cgroup))
        stack.enter_context(lock_directory(options.pins))
        fresh = not map_directory(options.pins).exists()
        try:
            api = stack.enter_context(api_listener(options.api))
            metrics = stack.enter_context(metrics_listeners(options.metrics))
            check_room(options.pins, cgroup)
            refuse_rivals(survey(options.pins, options.cgroup), coexist=options.coexist)
            balancer = stack.enter_context(Balancer(options.pins, sizes=options.map_sizes))
            installer = Installer(balancer.maps)
            state = AgentState(
                pid=os.getpid(),
                version=__version__,
                started_at=time.time(),
                cgroup=str(options.cgroup),
                bpffs=str(options.pins),
                source=SourceState(
                    [str(path) for path in options.paths], options.node_name, options.coexist
                ),
            )
            policies = PolicyKeeper(balancer.policies, options.cgroup)
            terminator = stack.enter_context(
                opened_terminator(
                    options.pins, options.api, balancer.maps, installer, options.limits, policies
                )
            )
            agent = _Agent(options, sources, balancer, installer, state, terminator)
            agent.sync.begin(first)
            balancer.attach(cgroup)
            agent.splice(stack)
        except BaseException:
            if fresh:
                remove_pins(options.pins, options.cgroup)
            raise
        asyncio.run(agent.follow(api, metrics))
        for number in _STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)  # an impatient second one must not cut this short
        if options.detach_on_exit:
            end_splicing(options.pins, options.cgroup)
            remove_pins(options.pins, options.cgroup)


class _Sources:
    """The manifests, and what of them is left to another tool.

    Only those are looked at that `watcher` says were touched, or all, once: without a watcher,
    and where `everywhere` is set.
    """

    def __init__(self, options: AgentOptions) -> None:
        self._files = FileSource(options.paths, node_name=options.node_name)
        self.watcher: FileWatcher | None = None
        self.everywhere = False
        self.coexistence = Coexistence() if options.coexist else None

    def load(self) -> Loaded:
        touched = self.watcher.take_touched() if self.watcher else None
        loaded = self._files.load(None if self.everywhere else touched)
        self.everywhere = False
        return loaded

    def leave_out(self, loaded: Loaded) -> Loaded:
        """Return *loaded* without what is left to another tool."""
        if self.coexistence is None:
            return loaded
        self.coexistence.refresh()
        return self.coexistence.leave_out(loaded)


async def _kept_up(work: Callable[[], Awaitable[None]]) -> None:
    """Run what never ends, and begin anew where it fails: the rest of the agent goes on."""
    while True:
        try:
            await work()
        except Exception as error:  # noqa: BLE001 (the kernel's, and our own mistakes)
            _LOG.error(
                "goes on after an error: %s", error, exc_info=_LOG.isEnabledFor(logging.DEBUG)
            )
        await asyncio.sleep(_AGAIN)


class _Agent:
    def __init__(
        self,
        options: AgentOptions,
        sources: _Sources,
        balancer: Balancer,
        installer: Installer,
        state: AgentState,
        terminator: Terminator,
    ) -> None:
        self._options = options
        self._sources = sources
        self._balancer = balancer
        self._installer = installer
        self._state = state
        self._rejections = RejectionLog(balancer.maps, installer, balancer.policies)
        self._wake = asyncio.Event()
        self._stopping = False
        self._terminator = terminator
        self._orders_changed = asyncio.Event()
        self._overrides = Overrides(options.api, options.pins, terminator.recorder.append)
        self._watching = Watching(terminator.recorder.append, options.watch_every)
        state.watch = self._watching.state
        self.health = HealthKeeper(
            self._wake.set,
            (
                member
                for member, known in installer.installed.members.items()
                if known.backend.state is BackendState.QUARANTINED
            ),
        )
        terminator.doubts = self.health.doubts
        self.sync = Synchronizer(
            sources.load, installer, terminator.policies, state, current_cookie(), terminator
        )
        self.sync.mark = self._mark

    def splice(self, stack: ExitStack) -> None:
        """From now on splice what the sources and the options opt in."""
        self.splicing = Splicing(
            self._options.pins,
            self._options.cgroup,
            self._state.splicing,
            options=self._options.splice,
            home=current_cookie(),
        )
        stack.callback(self.splicing.close)
        self.sync.splicing = self.splicing

    async def follow(self, api: socket, metrics: list[socket]) -> None:
        """Serve, and apply each change of the sources, until a signal says to stop."""
        with FileWatcher(self._options.paths) as watcher:
            self._sources.watcher = watcher
            async with self._servers(api, metrics), self._ticking():
                loop = asyncio.get_running_loop()
                loop.add_reader(watcher.fileno(), self._on_change, watcher)
                loop.add_signal_handler(signal.SIGHUP, self._on_hangup)
                for number in _STOP_SIGNALS:
                    loop.add_signal_handler(number, self._on_stop)
                services = self._state.services
                _LOG.info("balancing %d service%s", services, "" if services == 1 else "s")
                # Something may have changed between the first reading and the watch.
                self._wake.set()
                await self._follow()
        notify("STOPPING=1")
        _LOG.info(
            "stopping; %s",
            "balancing ends" if self._options.detach_on_exit else "the kernel goes on balancing",
        )

    async def _follow(self) -> None:
        ready = False
        wait: float | None = None
        pause = _RETRY
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(wait):
                    await self._wake.wait()
            self._wake.clear()
            if self._stopping:
                return
            await asyncio.sleep(_SETTLE)
            # What has failed may have had a cause that no change of the sources will tell of.
            if self._keep_in_line():
                wait, pause = None, _RETRY
            else:
                wait, pause = pause, min(2 * pause, _RETRY_MOST)
            self._orders_changed.set()
            status = f"STATUS={self._state.services} services, generation {self._state.generation}"
            notify(status) if ready else notify("READY=1", status)
            ready = True

    def _keep_in_line(self) -> bool:
        """Apply what the sources say now; return whether that went well."""
        try:
            self._rejections.write()  # before the counters of what is removed go
            good = self.sync.run()
            self._terminator.run()
        except (SockhopError, OSError) as error:
            _LOG.error("what is installed stays, another try follows: %s", error)
            return False
        return good

    def _mark(self, loaded: Loaded) -> Loaded:
        return self.health.mark(self._overrides.mark(self._sources.leave_out(loaded)))

    def _on_change(self, watcher: FileWatcher) -> None:
        try:
            changed = watcher.changed()
        except SystemLackError as error:
            _LOG.error("SIGHUP makes the agent look for changes that it cannot see: %s", error)
            changed = True
        if changed:
            self._wake.set()

    def _on_hangup(self) -> None:
        _LOG.info("SIGHUP: looking at all sources")
        self._sources.everywhere = True
        self._wake.set()

    def _known_state(self) -> AgentState:
        self._state.termination = self._terminator.state()
        self._state.health = self.health.state()
        self._state.overrides = self._overrides.state()
        return self._state

    def _approve(self, changes: Sequence[int] | None) -> Sequence[HeldChange]:
        approved = self._terminator.approve(changes)
        self._orders_changed.set()
        return approved

    def _set_backend(self, asked: BackendRequest) -> Sequence[Override]:
        said = self._overrides.say(
            (asked.address, asked.port), asked.state, service=asked.service, seconds=asked.seconds
        )
        self._keep_in_line()
        self._orders_changed.set()
        if self._state.sync_error:
            raise SystemLackError(f"noted, but not in force yet: {self._state.sync_error}")
        return said

    def _on_stop(self) -> None:
        self._stopping = True
        self._wake.set()

    @asynccontextmanager
    async def _servers(self, api: socket, metrics: list[socket]) -> AsyncIterator[None]:
        from sockhop.agent.api import api_application, serve  # noqa: PLC0415 (slow to import)

        application = api_application(self._known_state, self._approve, self._set_backend)
        runners = [await serve(application, [api])]
        try:
            if metrics:
                from sockhop.agent.metrics import (  # noqa: PLC0415
                    AgentCollector,
                    metrics_application,
                )

                collector = AgentCollector(
                    self._balancer.maps,
                    self._balancer.policies,
                    self._installer,
                    self._known_state,
                    self._terminator,
                    self._watching,
                )
                application = metrics_application(collector, self._state)
                runners.append(await serve(application, metrics))
            yield
        finally:
            for runner in runners:
                await runner.cleanup()

    @asynccontextmanager
    async def _ticking(self) -> AsyncIterator[None]:
        work = [
            self._log_rejections,
            self._settle,
            self._follow_places,
            self._terminate,
            self._sweep,
            self.health.run,
        ]
        if self._sources.coexistence:
            work.append(partial(self._follow_cilium, self._sources.coexistence))
        if self._options.watch_every:
            work.append(self._watching.run)
        if interval := watchdog_interval():
            work.append(partial(self._watchdog, interval))
        tasks = [asyncio.create_task(_kept_up(each)) for each in work]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
                with suppress(asyncio.CancelledError):
                    await task

    async def _watchdog(self, interval: float) -> None:
        while True:
            notify("WATCHDOG=1")
            await asyncio.sleep(interval)

    async def _settle(self) -> None:
        """Let the live counts come down where no hook saw a socket leave."""
        with Sockets(self._options.pins) as sockets:
            index = LiveIndex(self._balancer.maps, sockets)
            while True:
                await asyncio.sleep(self._options.settle_every)
                index.settle({old.id for old in self._installer.installed.members.values()})

    async def _follow_places(self) -> None:
        """Notice that a namespace or cgroup which clients name by path is there, or another one.

        And that the time of what was said by hand is over.
        """
        while True:
            await asyncio.sleep(_PLACES_EVERY)
            if self.sync.places.outdated() or self._overrides.overdue():
                self._wake.set()

    async def _terminate(self) -> None:
        """Carry out orders when they are due, and at once when there are new ones."""
        while True:
            wait = max(self._terminator.run() - now(), 0)
            with suppress(TimeoutError):
                async with asyncio.timeout(None if math.isinf(wait) else wait):
                    await self._orders_changed.wait()
            self._orders_changed.clear()

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(_SWEEP_EVERY)
            self.splicing.tick()

    async def _follow_cilium(self, coexistence: Coexistence) -> None:
        while True:
            await asyncio.sleep(_CILIUM_EVERY)
            if coexistence.refresh():
                _LOG.info("Cilium's frontends have changed")
                self._wake.set()

    async def _log_rejections(self) -> None:
        while True:
            await asyncio.sleep(_COUNTERS_EVERY)
            self._rejections.write()
