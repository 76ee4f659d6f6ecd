"""What a person has said of backends, instead of the manifests, kept so that it outlives the agent.

The desired state stays the manifests': an override ends when somebody says so, when its time is
over, or when the backend is in none of the service's frontends any more.
"""

import logging
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TypeAlias

import msgspec

from sockhop.agent.events import Event, EventKind
from sockhop.agent.kept import maps_epoch, replace_file
from sockhop.agent.orders import now
from sockhop.agent.state import Override
from sockhop.errors import SystemLackError
from sockhop.model import Backend, BackendState, Desired, Service, endpoint
from sockhop.sources.files import Loaded

__all__ = ["Overrides", "overrides_path", "read_overrides", "with_overrides"]

_LOG = logging.getLogger(__name__)

Address: TypeAlias = tuple[str, int]
States: TypeAlias = Mapping[Address, BackendState]


class _File(msgspec.Struct):
    """All overrides; with the maps of another epoch, after a reboot or a detach, they are void."""

    epoch: str
    overrides: list[Override]


def overrides_path(api: Path) -> Path:
    """Return where they are, given the agent's socket: api.sock has api.overrides beside it."""
    return api.with_suffix(".overrides")


def read_overrides(api: Path, pins: Path) -> list[Override]:
    """Return those that hold now for the maps below *pins*, be there an agent or not."""
    try:
        found = msgspec.json.decode(overrides_path(api).read_bytes(), type=_File)
        if found.epoch != maps_epoch(pins):
            return []
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise SystemLackError(f"{overrides_path(api)}: {error.strerror}") from None
    except msgspec.DecodeError as error:
        _LOG.warning("%s: what was said by hand is lost: %s", overrides_path(api), error)
        return []
    at = now()
    return [each for each in found.overrides if each.until is None or each.until > at]


def with_overrides(desired: Desired, overrides: Iterable[Override]) -> Desired:
    """Return *desired* with the states that *overrides* say."""
    said = _by_service(overrides)
    services = tuple(
        _overridden(each, said[each.name]) if each.name in said else each
        for each in desired.services
    )
    return msgspec.structs.replace(desired, services=services)


def _by_service(overrides: Iterable[Override]) -> dict[str, dict[Address, BackendState]]:
    said: defaultdict[str, dict[Address, BackendState]] = defaultdict(dict)
    for each in overrides:
        said[each.service][each.address, each.port] = each.state
    return dict(said)


def _overridden(service: Service, said: States) -> Service:
    replace = msgspec.structs.replace

    def state(backend: Backend) -> Backend:
        wanted = said.get((backend.address, backend.port), backend.state)
        return backend if wanted is backend.state else replace(backend, state=wanted)

    frontends = tuple(
        replace(frontend, backends=tuple(map(state, frontend.backends)))
        for frontend in service.frontends
    )
    return replace(service, frontends=frontends)


def _addresses(service: Service) -> set[Address]:
    return {(b.address, b.port) for frontend in service.frontends for b in frontend.backends}


class Overrides:
    """The overrides of a running agent, the same in memory and in the file."""

    def __init__(self, api: Path, pins: Path, append: Callable[[Iterable[Event]], None]) -> None:
        """Read those that an earlier agent has left. *append* writes events."""
        self._path = overrides_path(api)
        self._epoch = maps_epoch(pins)
        self._append = append
        self._found = read_overrides(api, pins)
        self._desired = Desired()
        self._marked: dict[str, tuple[Service, States, Service]] = {}

    def state(self) -> list[Override]:
        """Return those that hold."""
        return sorted(self._found, key=lambda each: (each.service, each.address, each.port))

    def mark(self, loaded: Loaded) -> Loaded:
        """Return *loaded* with the states that were said by hand; what is over is forgotten.

        A service that is as it was at the last call is the same object.
        """
        self._desired = loaded.desired
        if not self._found:
            return loaded
        self._forget(now())
        said = _by_service(self._found)
        before, self._marked = self._marked, {}
        services = []
        for service in loaded.desired.services:
            if states := said.get(service.name):
                known = before.get(service.name)
                if known is None or known[0] is not service or known[1] != states:
                    known = service, states, _overridden(service, states)
                self._marked[service.name] = known
                service = known[2]
            services.append(service)
        desired = msgspec.structs.replace(loaded.desired, services=tuple(services))
        return Loaded(desired, loaded.warnings)

    def overdue(self) -> bool:
        """Whether the time of one is over, so that the next mark() says something else."""
        return now() >= min((e.until for e in self._found if e.until is not None), default=math.inf)

    def say(
        self, backend: Address, state: BackendState, *, service: str = "", seconds: float = 0
    ) -> list[Override]:
        """Give *backend* a state in *service*, in all of its services without one; return what is.

        `active`: what the manifests say holds again; return what was said until now. *seconds*: for
        how long, 0 for no end. SystemLackError where that cannot be kept: then nothing has changed.
        """
        if state is BackendState.ACTIVE:
            gone = [e for e in self._found if (e.address, e.port) == backend]
            gone = [e for e in gone if service in ("", e.service)]
            if gone:
                self._keep([each for each in self._found if each not in gone])
            self._tell(gone, "is again what the manifest says, by hand")
            return gone
        names = [
            each.name
            for each in self._desired.services
            if service in ("", each.name) and backend in _addresses(each)
        ]
        if not names:
            return []
        until = now() + seconds if seconds else None
        said = [Override(name, *backend, state, until) for name in names]
        kept = [e for e in self._found if e.service not in names or (e.address, e.port) != backend]
        self._keep(kept + said)
        state_text = "in maintenance" if state is BackendState.MAINTENANCE else state
        self._tell(said, f"is {state_text}, by hand" + (f", for {seconds:g}s" if seconds else ""))
        return said

    def _forget(self, at: float) -> None:
        there = {each.name: each for each in self._desired.services}
        over = [each for each in self._found if each.until is not None and each.until <= at]
        gone = [
            each
            for each in self._found
            if each not in over
            and (
                each.service not in there
                or (each.address, each.port) not in _addresses(there[each.service])
            )
        ]
        if not over and not gone:
            return
        left = [each for each in self._found if each not in over and each not in gone]
        try:
            self._keep(left)
        except SystemLackError as error:
            _LOG.error("%s", error)
            self._found = left
        self._tell(over, "is again what the manifest says: its time is over")
        self._tell(gone, "is in the manifest no more, and what was said by hand is over")

    def _keep(self, overrides: list[Override]) -> None:
        try:
            replace_file(self._path, msgspec.json.encode(_File(self._epoch, overrides)))
        except OSError as error:
            raise SystemLackError(
                f"{self._path}: {error.strerror}: nothing was changed",
                hint="what is said by hand is kept beside the agent's socket (--api, SOCKHOP_API)",
            ) from None
        self._found = overrides

    def _tell(self, overrides: Iterable[Override], what: str) -> None:
        events = []
        for each in overrides:
            where = f"{endpoint(each.address, each.port)} of {each.service}"
            text = f"{where} {what}"
            _LOG.info("%s", text)
            events.append(Event(time.time(), EventKind.SET, text, service=each.service))
        self._append(events)
