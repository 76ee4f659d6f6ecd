"""Which backends are healthy, as the services' own checks find; the others are quarantined.

The kernel remembers for the next agent: what is installed as quarantined, though its manifest calls
it active, stays so until its checks succeed.
"""

import asyncio
import logging
import random
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable
from contextlib import suppress
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from sockhop.agent.state import HealthState, UnhealthyBackend
from sockhop.agent.target import Member, split_service_port
from sockhop.model import BackendState, Desired, HealthCheck, Service, endpoint
from sockhop.sources.files import Loaded

if TYPE_CHECKING:
    from sockhop.agent.health_check import Prober

__all__ = ["HealthKeeper", "Opinion", "with_quarantine"]

_LOG = logging.getLogger(__name__)
_AT_ONCE = 64
"""Checks under way: enough for thousands of backends, few enough for the agent's descriptors."""

Address = tuple[str, int]


def with_quarantine(desired: Desired, unhealthy: Iterable[UnhealthyBackend]) -> Desired:
    """Return *desired* with these active backends quarantined."""
    found: defaultdict[str, set[Address]] = defaultdict(set)
    for backend in unhealthy:
        found[backend.service].add((backend.address, backend.port))
    services = tuple(
        _quarantine(service, found[service.name]) if service.name in found else service
        for service in desired.services
    )
    return msgspec.structs.replace(desired, services=services)


def _quarantine(service: Service, unhealthy: Collection[Address]) -> Service:
    replace = msgspec.structs.replace
    return replace(
        service,
        frontends=tuple(
            replace(
                frontend,
                backends=tuple(
                    replace(backend, state=BackendState.QUARANTINED)
                    if backend.state is BackendState.ACTIVE
                    and (backend.address, backend.port) in unhealthy
                    else backend
                    for backend in frontend.backends
                ),
            )
            for frontend in service.frontends
        ),
    )


class Opinion:
    """What the results so far mean. `healthy` is None before the first, which decides at once."""

    def __init__(self, *, healthy: bool | None = None, reason: str = "") -> None:
        self.healthy = healthy
        self.failing = healthy is False
        """Whether the last result was bad."""
        self.reason = reason
        self.since = time.time()
        self._against = 0

    def note(self, reason: str, check: HealthCheck) -> bool:
        """Take a result, "" or what is wrong; return whether it turned the opinion."""
        good = not reason
        self.failing = not good
        if good is self.healthy:
            self._against = 0
            self.reason = reason
            return False
        self._against += 1
        if self.healthy is not None and self._against < (check.rise if good else check.fall):
            return False
        turned = self.healthy is not None or not good
        self.healthy, self.reason, self.since, self._against = good, reason, time.time(), 0
        return turned


class _Key(NamedTuple):
    """What is checked: once, however many services ask for the same."""

    address: str
    port: int
    check: HealthCheck


class HealthKeeper:
    """Checks the backends of the services that ask for it, and quarantines the unhealthy ones."""

    def __init__(self, wake: Callable[[], None], quarantined: Iterable[Member]) -> None:
        """*wake* is called when the next mark() would say something else.

        *quarantined*: the members that are installed as such.
        """
        self._wake = wake
        self._before = {
            (split_service_port(member.service)[0], member.address, member.port)
            for member in quarantined
        }
        self._opinions: dict[_Key, Opinion] = {}
        self._services: dict[_Key, list[str]] = {}
        self._marked: dict[str, tuple[Service, frozenset[Address], Service]] = {}
        self._unasked: dict[_Key, str] = {}
        self._changed = asyncio.Event()

    def mark(self, loaded: Loaded) -> Loaded:
        """Return *loaded* with the unhealthy backends quarantined, and check those that it names.

        A service that is as it was at the last call is the same object.
        """
        wanted: dict[_Key, list[str]] = {}
        marked = {}
        services = []
        for service in loaded.desired.services:
            if service.health is None:
                services.append(service)
                continue
            unhealthy = self._look_at(service, service.health, wanted)
            known = self._marked.get(service.name)
            if known is None or known[0] is not service or known[1] != unhealthy:
                known = service, unhealthy, _quarantine(service, unhealthy)
            marked[service.name] = known
            services.append(known[2] if unhealthy else service)
        if wanted.keys() != self._services.keys():
            self._changed.set()
        self._services, self._marked, self._before = wanted, marked, set()
        self._opinions = {key: self._opinions[key] for key in wanted}
        self._unasked = {key: why for key, why in self._unasked.items() if key in wanted}
        if not marked:
            return loaded
        desired = msgspec.structs.replace(loaded.desired, services=tuple(services))
        return Loaded(desired, loaded.warnings)

    def _look_at(
        self, service: Service, check: HealthCheck, wanted: dict[_Key, list[str]]
    ) -> frozenset[Address]:
        """Add to *wanted* what is to be checked; return what is known to be unhealthy."""
        active = {
            (backend.address, backend.port)
            for frontend in service.frontends
            for backend in frontend.backends
            if backend.state is BackendState.ACTIVE
        }
        unhealthy = []
        for address, port in active:
            key = _Key(address, port, check)
            opinion = self._opinions.get(key)
            if opinion is None:
                opinion = self._opinions[key] = self._first(service.name, key)
            wanted.setdefault(key, []).append(service.name)
            if opinion.healthy is False:
                unhealthy.append((address, port))
        return frozenset(unhealthy)

    def _first(self, service: str, key: _Key) -> Opinion:
        """Return what is thought of a backend before its first result."""
        address = key.address, key.port
        known = self._marked.get(service)
        if (service, *address) in self._before or (known and address in known[1]):
            return Opinion(healthy=False, reason=f"{key.check}: not yet, but unhealthy before")
        return Opinion()

    def state(self) -> HealthState:
        """Return what the checks have found."""
        return HealthState(
            len(self._services),
            [
                UnhealthyBackend(name, key.address, key.port, opinion.reason, opinion.since)
                for key, names in sorted(self._services.items(), key=lambda item: item[0][:2])
                if (opinion := self._opinions[key]).healthy is False
                for name in names
            ],
            dict(Counter(self._unasked.values())),
        )

    def doubts(self) -> dict[str, str]:
        """Return the services of which most backends fail now, and what that says, a sentence.

        Not only those that are quarantined already: where the network of this node is broken they
        fail together, but one is always the first. It may be the checks that are wrong then.
        """
        checked: Counter[str] = Counter()
        failing: Counter[str] = Counter()
        for key, names in self._services.items():
            checked.update(names)
            if self._opinions[key].failing:
                failing.update(names)
        return {
            name: f"{count:,} of {checked[name]:,} backends of {name} fail their checks"
            for name, count in failing.items()
            if count * 2 > checked[name]
        }

    async def run(self) -> None:
        """Check until cancelled."""
        from sockhop.agent.health_check import Prober  # noqa: PLC0415 (slow to import)

        tasks: dict[_Key, asyncio.Task[None]] = {}
        turns = asyncio.Semaphore(_AT_ONCE)
        async with Prober() as prober:
            try:
                while True:
                    for key in tasks.keys() - self._services.keys():
                        tasks.pop(key).cancel()
                    for key in self._services.keys() - tasks.keys():
                        tasks[key] = asyncio.create_task(self._follow(key, prober, turns))
                    await self._changed.wait()
                    self._changed.clear()
            finally:
                for task in tasks.values():
                    task.cancel()
                with suppress(asyncio.CancelledError):
                    await asyncio.gather(*tasks.values(), return_exceptions=True)

    async def _follow(self, key: _Key, prober: "Prober", turns: asyncio.Semaphore) -> None:
        while True:
            reason = await self._ask(key, prober, turns)
            opinion = self._opinions.get(key)
            if reason is not None and opinion and opinion.note(reason, key.check):
                self._say(key, opinion)
                self._wake()
            # Not all of them in step.
            await asyncio.sleep(key.check.interval * random.uniform(0.9, 1.1))

    async def _ask(self, key: _Key, prober: "Prober", turns: asyncio.Semaphore) -> str | None:
        """Return what :meth:`Prober.ask` does; what keeps the agent from it is logged once."""
        from sockhop.agent.health_check import UnaskedError  # noqa: PLC0415 (slow to import)

        try:
            async with turns:
                reason = await prober.ask(*key)
        except Exception as error:  # noqa: BLE001 (without it this backend is never asked again)
            why = str(error) if isinstance(error, UnaskedError) else repr(error)
            if why not in self._unasked.values():
                where = endpoint(key.address, key.port)
                names = ", ".join(self._services.get(key, ()))
                _LOG.warning("cannot check %s of %s, and maybe others: %s", where, names, why)
            self._unasked[key] = why
            return None
        self._unasked.pop(key, None)
        return reason

    def _say(self, key: _Key, opinion: Opinion) -> None:
        names = ", ".join(self._services[key])
        where = endpoint(key.address, key.port)
        if opinion.healthy:
            _LOG.info("healthy again: %s of %s", where, names)
        else:
            _LOG.warning("unhealthy: %s of %s: %s", where, names, opinion.reason)
