"""Intents that wait to be carried out, kept in a file so that they outlive the agent."""

import logging
import time
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path

import msgspec

from sockhop.agent.concerns import describe
from sockhop.agent.kept import maps_epoch, replace_file
from sockhop.agent.target import Member
from sockhop.datapath.sockets import Pair
from sockhop.model import Intent, IntentRule, Protocol, Trigger, endpoint

__all__ = ["Order", "OrderFile", "Orders", "Standing", "now", "orders_path", "read_rules"]

_LOG = logging.getLogger(__name__)


class Standing(StrEnum):
    """Whether an order is carried out."""

    DUE = "due"
    HELD = "held"
    """Not before somebody approves of it."""
    RETURNED = "returned"
    """Not any more: the backend is one of its service again, under another id."""


class Order(msgspec.Struct):
    """What should become of the sockets of a backend that has left its service, or changed.

    `service` is the service port; `since` is when the time of the intent began, in seconds of
    CLOCK_BOOTTIME; `held` says why nobody approved of it yet.
    """

    service: str
    address: str
    port: int
    protocol: Protocol
    pair: Pair
    trigger: Trigger
    intent: Intent
    change: int
    since: float
    standing: Standing = Standing.DUE
    held: str = ""

    @property
    def member(self) -> Member:
        """The backend that it is about."""
        return Member(self.service, self.address, self.port, self.protocol)

    @property
    def reason(self) -> str:
        """What befell the backend, for people."""
        return describe(self.trigger, self.service, [endpoint(self.address, self.port)])


class OrderFile(msgspec.Struct):
    """The orders, and what services have said last: one that is removed can't say it any more.

    `epoch` is that of the maps by whose ids backends are known; with other maps all is void.
    `redirects`: the ids of services that stand for local redirects, or stood for one of which
    sockets may be left.
    """

    epoch: str
    rules: dict[str, tuple[IntentRule, ...]]
    orders: list[Order]
    redirects: list[int] = []


def now() -> float:
    """Return the time by which orders are due, in seconds."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def orders_path(api: Path) -> Path:
    """Return where orders are, given the agent's socket: api.sock has api.orders beside it."""
    return api.with_suffix(".orders")


class Orders:
    """All orders by the pair that they are about, the same in memory and in the file."""

    def __init__(self, path: Path, pins: Path) -> None:
        """Read the file, which belongs to the maps below *pins*; one that is unreadable is void."""
        self._path = path
        self._epoch = maps_epoch(pins)
        self._by_pair: dict[Pair, Order] = {}
        self._saved = b""
        self.rules: dict[str, tuple[IntentRule, ...]] = {}
        """What services say, by their names; one that is not there says nothing."""
        self.redirects: set[int] = set()
        """As in the file."""
        found = _read(path)
        if found is not None and found.epoch == self._epoch:
            self.rules, self.redirects = found.rules, set(found.redirects)
            self._by_pair = {order.pair: order for order in found.orders}

    def __iter__(self) -> Iterator[Order]:
        return iter(list(self._by_pair.values()))

    def __len__(self) -> int:
        return len(self._by_pair)

    def get(self, pair: Pair) -> Order | None:
        """Return the order about *pair*."""
        return self._by_pair.get(pair)

    def add(self, order: Order) -> None:
        """Take an order, in place of an earlier one about the same pair."""
        self._by_pair[order.pair] = order

    def drop(self, pair: Pair) -> None:
        """Forget the order about *pair*, if there is one."""
        self._by_pair.pop(pair, None)

    def save(self) -> None:
        """Write the file, if it says something else. That it can't be written is logged."""
        orders = list(self._by_pair.values())
        data = msgspec.json.encode(
            OrderFile(self._epoch, self.rules, orders, sorted(self.redirects))
        )
        if data == self._saved:
            return
        try:
            replace_file(self._path, data)
            self._saved = data
        except OSError as error:
            _LOG.error("%s: %s: a restart will forget what waits", self._path, error.strerror)


def read_rules(path: Path, pins: Path) -> dict[str, tuple[IntentRule, ...]]:
    """Return what the services say that an agent has installed in the maps below *pins*."""
    found = _read(path)
    try:
        return found.rules if found and found.epoch == maps_epoch(pins) else {}
    except FileNotFoundError:  # nothing is installed
        return {}


def _read(path: Path) -> OrderFile | None:
    try:
        return msgspec.json.decode(path.read_bytes(), type=OrderFile)
    except (OSError, msgspec.DecodeError):
        return None
