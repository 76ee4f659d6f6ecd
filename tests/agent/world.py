"""A node whose services change, its clients, and a simple model of what should become of them."""

import random
import selectors
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from sockhop.agent.orders import now
from sockhop.agent.plan import make_plan
from sockhop.agent.target import expand
from sockhop.agent.terminate import Terminator
from sockhop.datapath.records import STATES
from sockhop.datapath.sockets import Socket, Sockets
from sockhop.kernel.netns import entered
from sockhop.model import (
    BackendState,
    Desired,
    Intent,
    IntentKind,
    IntentRule,
    Protocol,
    Service,
    Trigger,
    intent_for,
    unpack_address,
)
from tests.datapath.kinds import DISCONNECT, cookie, fate
from tests.datapath.node import Node, backend, service
from tests.datapath.udp import connect_raw

__all__ = ["Client", "Model", "Servers", "World"]

PORTS = (7001, 7002, 7003)
HOSTS = {4: "10.96.0.1", 6: "fd00:96::1"}
VIPS = {("a", 4): "10.9.0.1", ("a", 6): "fd00:9::1", ("b", 4): "10.9.0.2", ("b", 6): "fd00:9::2"}
ELSEWHERE = 7999
KINDS = {Protocol.TCP: socket.SOCK_STREAM, Protocol.UDP: socket.SOCK_DGRAM}
ACTIVE, TERMINATING = BackendState.ACTIVE, BackendState.TERMINATING
TRIGGERS = {BackendState(t.value): t for t in Trigger if t.value in list(BackendState)}
INTENTS = (
    Intent(IntentKind.LEAVE),
    Intent(IntentKind.SEVER),
    Intent(IntentKind.RESTEER),
    Intent(IntentKind.DRAIN, 0.0, 0.0),
    Intent(IntentKind.DRAIN, 3600.0),
)

Where = tuple[str, int]
"""A service, and the family of a frontend of it."""


class Servers:
    """In one network namespace: something listens at every backend, and holds what it accepts."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._sockets: list[socket.socket] = []
        for family, host in HOSTS.items():
            for port in (*PORTS, ELSEWHERE):
                for kind in KINDS.values():
                    own = socket.socket(_family(family), kind)
                    own.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                    own.bind((host, port))
                    own.setblocking(False)
                    self._sockets.append(own)
                    if kind == socket.SOCK_STREAM:
                        own.listen(1024)
                        self._selector.register(own, selectors.EVENT_READ, "listens")
        self._stop = False
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop:
            for key, _ in self._selector.select(0.05):
                own = key.fileobj
                assert isinstance(own, socket.socket)
                with suppress(OSError):
                    if key.data:
                        new = own.accept()[0]
                        self._sockets.append(new)
                        self._selector.register(new, selectors.EVENT_READ)
                        continue
                    if own.recv(1024):
                        continue
                self._selector.unregister(own)  # its client has gone
                own.close()

    def close(self) -> None:
        self._stop = True
        self._thread.join(5)
        self._selector.close()
        for own in self._sockets:
            own.close()


@dataclass(eq=False)
class Stay:
    """A backend from when it comes to its service until it leaves; one that returns is another."""

    where: Where
    port: int
    protocol: Protocol


@dataclass
class Order:
    intent: Intent
    trigger: Trigger
    returned: bool = False


@dataclass(eq=False)
class Client:
    """A socket, and where the model has it: at a stay, or at a peer that concerns nobody."""

    own: socket.socket
    kind: str
    protocol: Protocol
    dialled: Where | None = None
    stay: Stay | None = None
    may_move: bool = False
    ended: bool = False
    found: str = ""
    cookie: int = field(init=False)

    def __post_init__(self) -> None:
        self.cookie = cookie(self.own)

    def look(self) -> str:
        """Take the error that waits for the program; it is there once."""
        self.found = self.found or fate(self.own)
        return self.found


Backends = dict[Where, dict[int, BackendState]]


class Model:
    """What docs/severing.md says, without kernel and ids."""

    def __init__(self) -> None:
        self.backends: Backends = {where: {} for where in VIPS}
        self.rules: dict[str, tuple[IntentRule, ...]] = {"a": (), "b": ()}
        self.stays: dict[tuple[Where, int, Protocol], Stay] = {}
        self.orders: dict[Stay, Order] = {}
        self.clients: list[Client] = []

    def serving(self, where: Where) -> set[int]:
        found = self.backends[where]
        for state in (ACTIVE, TERMINATING):
            if ports := {port for port, of in found.items() if of is state}:
                return ports
        return set()

    def active(self, where: Where) -> set[int]:
        return {port for port, of in self.backends[where].items() if of is ACTIVE}

    def change(self, backends: Backends, rules: dict[str, tuple[IntentRule, ...]]) -> None:
        before, self.backends, self.rules = self.backends, backends, rules
        for where in VIPS:
            for port in PORTS:
                for protocol in Protocol:
                    old, new = before[where].get(port), backends[where].get(port)
                    if old is not new:
                        self._befall(where, port, protocol, new)
        self.carry_out()

    def _befall(
        self, where: Where, port: int, protocol: Protocol, new: BackendState | None
    ) -> None:
        key = (where, port, protocol)
        stay = self.stays.get(key)
        earlier = [
            each
            for each, order in self.orders.items()
            if (each.where, each.port, each.protocol) == key and each is not stay
        ]
        if stay is None:  # it comes, perhaps back
            self.stays[key] = Stay(where, port, protocol)
            for each in earlier:
                self.orders[each].returned = True
            return
        if new is ACTIVE:
            self.orders.pop(stay, None)
            for each in earlier:
                self.orders[each].returned = True
            return
        trigger = TRIGGERS[new] if new else Trigger.REMOVED
        intent = intent_for(self.rules[where[0]], protocol, trigger)
        for each in (stay, *earlier):
            self.orders.pop(each, None)
            if intent.kind is not IntentKind.LEAVE:
                self.orders[each] = Order(intent, trigger)
        if new is None:
            del self.stays[key]

    def carry_out(self) -> None:
        for stay, order in list(self.orders.items()):
            mine = [each for each in self.clients if each.stay is stay and not each.ended]
            if not mine and order.trigger is Trigger.REMOVED:
                del self.orders[stay]
                continue
            waits = order.trigger is not Trigger.REMOVED and stay.port in self.serving(stay.where)
            if order.returned or waits:
                continue
            for each in mine:
                if order.intent.kind is IntentKind.RESTEER:
                    each.may_move = each.dialled is not None and bool(self.active(each.dialled))
                elif order.intent.kind is IntentKind.SEVER or order.intent.deadline == 0.0:
                    each.ended = True


class World:
    """The model beside the kernel: makes clients, changes services, compares."""

    def __init__(self, node: Node, terminator: Terminator, spaces: list[Path], seed: int) -> None:
        self.chance = random.Random(seed)
        self.model = Model()
        self.counts = {"ended": 0, "moved": 0, "left": 0}
        self._node = node
        self._terminator = terminator
        self._spaces = spaces

    def close(self) -> None:
        for each in self.model.clients:
            each.own.close()

    # --- the services -------------------------------------------------------------------------

    def change(self) -> None:
        """Change some backends and intents at random, in the kernel and in the model."""
        chance, backends = self.chance, {w: dict(b) for w, b in self.model.backends.items()}
        for where in VIPS:
            for port in PORTS:
                if chance.random() < 0.25:
                    backends[where].pop(port, None)
                    if chance.random() < 0.7:
                        weights = (6, 2, 1, 1)
                        backends[where][port] = chance.choices(STATES, weights)[0]
        rules = {name: self._rules() for name in "ab"}
        wanted = [self._service(name, backends, rules[name]) for name in "ab"]
        target = expand(Desired(tuple(wanted)), self._node.home)
        plan = make_plan(target, self._node.installer.installed)
        self._terminator.prepare(plan, {each.name: each for each in wanted})
        self._node.installer.apply(plan)
        self._terminator.begin()
        self.model.change(backends, rules)
        self._terminator.run()

    def _rules(self) -> tuple[IntentRule, ...]:
        return tuple(
            IntentRule(protocol, trigger, self.chance.choice(INTENTS))
            for protocol in Protocol
            for trigger in Trigger
            if self.chance.random() < 0.7
        )

    def _service(self, name: str, backends: Backends, rules: tuple[IntentRule, ...]) -> Service:
        texts = []
        for family, form in ((4, "{}:{}"), (6, "[{}]:{}")):
            for port, state in backends[name, family].items():
                texts.append(backend(form.format(HOSTS[family], port), state=state))
        # Without IPv6 backends an IPv6 frontend would get the IPv4 ones.
        ends = [f"{VIPS[name, 4]}:80/{p}" for p in ("tcp", "udp")]
        ends += [f"[{VIPS[name, 6]}]:80/{p}" for p in ("tcp", "udp") if backends[name, 6]]
        return service(name, *ends, backends=texts, intents=rules)

    # --- the clients --------------------------------------------------------------------------

    def connect(self) -> None:
        """Make a socket of a random kind."""
        kind = self.chance.choice(_KINDS)
        with ExitStack() as stack:
            space = self.chance.choice(self._spaces)
            with entered(space):
                for client in kind(self, stack):
                    self.model.clients.append(client)
            stack.pop_all()

    def new(self, stack: ExitStack, family: int, protocol: Protocol) -> socket.socket:
        own = stack.enter_context(socket.socket(_family(family), KINDS[protocol]))
        own.settimeout(30)
        return own

    def dial(self, stack: ExitStack, protocol: Protocol) -> Client | None:
        """A client of a service; None if there is nothing to go to."""
        where = self.chance.choice([w for w in VIPS if self.model.backends[w]] or list(VIPS))
        serving = self.model.serving(where)
        if not serving:
            return None
        family = where[1]
        mapped = family == 4 and self.chance.random() < 0.3
        own = self.new(stack, 6 if mapped else family, protocol)
        own.connect(("::ffff:" * mapped + VIPS[where], 80))
        client = Client(own, f"{protocol} of {where}", protocol, where)
        self.locate(client)
        return client

    def locate(self, client: Client) -> None:
        """Note at which backend the hooks have put it; that must be one that serves."""
        assert client.dialled is not None
        host, port = self._node.chosen(client.own.fileno())
        assert (host, port) == (HOSTS[client.dialled[1]], port)
        assert port in self.model.serving(client.dialled), client.kind
        client.stay = self.model.stays[client.dialled, port, client.protocol]

    # --- the comparison -----------------------------------------------------------------------

    def check(self, sockets: Sockets) -> None:
        """Whether exactly those were ended or moved that the model says; forget the ended.

        The kernel's list of sockets skips some while others come and go: what has missed one is
        looked at again a moment later.
        """
        for patience in (0.2, 1.2):
            if all(client.look() or not client.ended for client in self.model.clients) and all(
                self._has_moved(client) or not client.may_move for client in self.model.clients
            ):
                break
            self.wait(patience)
        known = {each.cookie: each for _ in range(3) for each in sockets.remembered()}
        for client in list(self.model.clients):
            found = client.look()
            said = f"{client.kind}, {client.stay}: {found or 'alive'}"
            if client.ended:
                assert found == "ECONNABORTED", said
                client.own.close()
                self.model.clients.remove(client)
                self.counts["ended"] += 1
            else:
                assert not found, said
                self._check_peer(client, known.get(client.cookie), said)
        self.model.carry_out()

    def _has_moved(self, client: Client) -> bool:
        if client.dialled is None or client.ended:
            return False
        _, port = self._node.chosen(client.own.fileno())
        return port in self.model.active(client.dialled)

    def _check_peer(self, client: Client, known: Socket | None, said: str) -> None:
        if client.may_move:
            assert client.dialled is not None
            client.may_move = False
            self.locate(client)
            assert client.stay is not None
            assert client.stay.port in self.model.active(client.dialled), said
            self.counts["moved"] += 1
        if client.stay is not None and known is not None:
            peer = unpack_address(known.remote_address), known.remote_port
            assert peer == (HOSTS[client.stay.where[1]], client.stay.port), said
        self.counts["left"] += 1

    def wait(self, seconds: float) -> None:
        """Let the terminator look again at what it has done."""
        end = now() + seconds
        while now() < end:
            threading.Event().wait(0.05)
            self._terminator.run()


def _family(family: int) -> socket.AddressFamily:
    return socket.AF_INET if family == 4 else socket.AF_INET6


Kind = Callable[[World, ExitStack], Iterator[Client]]


def _balanced_tcp(world: World, stack: ExitStack) -> Iterator[Client]:
    if client := world.dial(stack, Protocol.TCP):
        yield client


def _balanced_udp(world: World, stack: ExitStack) -> Iterator[Client]:
    if client := world.dial(stack, Protocol.UDP):
        yield client


def _unmanaged(world: World, stack: ExitStack) -> Iterator[Client]:
    """Connected to a backend, through no service."""
    family, protocol = world.chance.choice((4, 6)), world.chance.choice(list(Protocol))
    own = world.new(stack, family, protocol)
    own.connect((HOSTS[family], world.chance.choice(PORTS)))
    yield Client(own, f"unmanaged {protocol}", protocol)


def _unconnected(world: World, stack: ExitStack) -> Iterator[Client]:
    """It sends to a service, and is bound or not."""
    own = world.new(stack, 4, Protocol.UDP)
    if world.chance.random() < 0.5:
        own.bind((HOSTS[4], 0))
    with suppress(OSError):
        own.sendto(b"?", (VIPS["a", 4], 80))
    yield Client(own, "unconnected", Protocol.UDP)


def _gone_elsewhere(world: World, stack: ExitStack) -> Iterator[Client]:
    """It was with a backend, and went to a peer of no service."""
    protocol = world.chance.choice(list(Protocol))
    client = world.dial(stack, protocol)
    if client and client.dialled:
        if protocol is Protocol.TCP:
            connect_raw(client.own, DISCONNECT)
        mapped = client.own.family == socket.AF_INET6 and client.dialled[1] == 4
        client.own.connect(("::ffff:" * mapped + HOSTS[client.dialled[1]], ELSEWHERE))
        yield Client(client.own, f"{protocol} gone elsewhere", protocol)


def _disconnected(world: World, stack: ExitStack) -> Iterator[Client]:
    """It is still in the kernel's tables if it has a port of its own."""
    where = ("a", 4)
    if world.model.serving(where):
        own = world.new(stack, 4, Protocol.UDP)
        for _ in range(9):
            with suppress(OSError):
                own.bind((HOSTS[4], world.chance.randint(20000, 30000)))
                break
        own.connect((VIPS[where], 80))
        connect_raw(own, DISCONNECT)
        yield Client(own, "disconnected", Protocol.UDP)


def _gone_to_another_service(world: World, stack: ExitStack) -> Iterator[Client]:
    """From a to b, which may have the same backend."""
    family = 4
    if world.model.serving(("a", family)) and world.model.serving(("b", family)):
        own = world.new(stack, family, Protocol.UDP)
        for name in "ab":
            own.connect((VIPS[name, family], 80))
        client = Client(own, "UDP gone from a to b", Protocol.UDP, ("b", family))
        world.locate(client)
        yield client


def _listening(world: World, stack: ExitStack) -> Iterator[Client]:
    own = world.new(stack, 4, Protocol.TCP)
    own.bind((HOSTS[4], 0))
    own.listen()
    yield Client(own, "listening", Protocol.TCP)


_KINDS: tuple[Kind, ...] = (
    *(_balanced_tcp, _balanced_udp) * 5,
    *(_unmanaged, _unconnected, _gone_elsewhere, _disconnected),
    *(_gone_to_another_service, _listening),
)


@contextmanager
def churn(seed: int) -> Iterator[None]:
    """Connect to the services and close again, all the time, until the body ends."""
    stop = threading.Event()

    def run() -> None:
        chance = random.Random(seed)
        held: list[socket.socket] = []
        while not stop.is_set():
            (_, family), vip = chance.choice(list(VIPS.items()))
            own = socket.socket(_family(family), chance.choice(list(KINDS.values())))
            own.settimeout(1)
            with suppress(OSError):
                own.connect((vip, 80))
            held.append(own)
            if len(held) > 20:
                held.pop(chance.randrange(20)).close()
            stop.wait(0.001)
        for own in held:
            own.close()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(10)
