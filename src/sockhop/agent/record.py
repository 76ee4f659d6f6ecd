"""Turns what was done to sockets into events, log lines and counters."""

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from sockhop.agent.events import Event, EventKind, EventLog
from sockhop.agent.target import split_service_port
from sockhop.datapath.outcome import Action, Outcome
from sockhop.datapath.sockets import Socket
from sockhop.errors import SystemLackError
from sockhop.kernel.procfs import find_holders
from sockhop.model import Protocol, endpoint, unpack_address

__all__ = ["BY_HAND", "Cause", "Recorder"]

_LOG = logging.getLogger(__name__)
_KINDS = {
    Action.SEVERED: EventKind.SEVERED,
    Action.RESTEERED: EventKind.RESTEERED,
    Action.REFUSED: EventKind.REFUSED,
}
_PROTOCOLS = {protocol.number: protocol.value for protocol in Protocol}
_REMEMBERED = 10_000

BY_HAND = "by hand"


class Cause(NamedTuple):
    """Why something was done: `trigger` is the word for metrics, `reason` the sentence."""

    trigger: str
    reason: str
    service: str = ""
    intent: str = ""
    change: int = 0


class Recorder:
    """Keeps the record: a bounded file of events, and counters since this process began."""

    def __init__(self, log: EventLog, names: Callable[[], Mapping[int, str]]) -> None:
        """*names* returns the service ports by their ids, for causes that name no service."""
        self.totals: Counter[tuple[str, str, str]] = Counter()
        """By action, trigger and protocol."""
        self._log = log
        self._names = names
        self._refused: dict[int, str] = {}
        self._complaint = ""

    def record(self, done: Iterable[tuple[Outcome, Cause]]) -> None:
        """Note what was done; what was left alone, or had gone by itself, leaves no trace.

        A socket that is refused again and again is noted once for each reason.
        """
        noted = [(outcome, cause) for outcome, cause in done if self._is_new(outcome)]
        if not noted:
            return
        holders = find_holders({outcome.socket.inode for outcome, _ in noted} - {0})
        names = self._names() if any(not cause.service for _, cause in noted) else {}
        stamp, events = time.time(), []
        lines: Counter[str] = Counter()
        for outcome, cause in noted:
            each = outcome.socket
            processes = sorted({str(holder) for holder in holders.get(each.inode, ())})
            events.append(_event(stamp, outcome, cause, names, processes))
            protocol = _PROTOCOLS.get(each.protocol, "raw").lower()
            self.totals[outcome.action, cause.trigger, protocol] += 1
            why = f" ({outcome.reason})" if outcome.action is Action.REFUSED else ""
            lines[f"{cause.reason}: {protocol} sockets {outcome.action}{why}"] += 1
        self.append(events)
        for line, count in lines.items():
            _LOG.info("%s: %d", line, count)

    def append(self, events: Iterable[Event]) -> None:
        """Write *events*. That this fails is logged: it must not keep sockets alive."""
        try:
            self._log.append(events)
            self._complaint = ""
        except SystemLackError as error:
            if str(error) != self._complaint:
                _LOG.error("events are lost: %s", error)
            self._complaint = str(error)

    def _is_new(self, outcome: Outcome) -> bool:
        if outcome.action is Action.REFUSED:
            cookie = outcome.socket.cookie
            if self._refused.get(cookie) == outcome.reason:
                return False
            if len(self._refused) >= _REMEMBERED:
                self._refused.clear()
            self._refused[cookie] = outcome.reason
        return outcome.action in _KINDS


def _event(
    stamp: float, outcome: Outcome, cause: Cause, names: Mapping[int, str], processes: list[str]
) -> Event:
    each, origin = outcome.socket, outcome.socket.origin
    service = cause.service or (names.get(origin.service, "") if origin else "")
    return Event(
        time=stamp,
        kind=_KINDS[outcome.action],
        reason=f"{cause.reason} ({outcome.reason})" if outcome.reason else cause.reason,
        change=cause.change,
        service=split_service_port(service)[0],
        intent=cause.intent,
        protocol=_PROTOCOLS.get(each.protocol, "RAW"),
        local=endpoint(unpack_address(each.local_address), each.local_port),
        remote=_remote(each),
        frontend=endpoint(unpack_address(origin.frontend_address), origin.frontend_port)
        if origin
        else "",
        backend=_remote(each) if origin else "",
        cookie=each.cookie,
        netns=each.netns,
        processes=processes,
    )


def _remote(each: Socket) -> str:
    return endpoint(unpack_address(each.remote_address), each.remote_port)
