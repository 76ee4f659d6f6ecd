"""Services as sockhop knows them: frozen, validated, no I/O.

A :class:`Service` has frontends; each :class:`Frontend` carries the backends that may serve
it, so that one value says everything about one address that clients dial. Sources build these
objects, the agent compares them with what the kernel holds.
"""

import ipaddress
import socket
from collections.abc import Iterable
from enum import StrEnum
from typing import Literal

import msgspec

__all__ = [
    "Algorithm",
    "Backend",
    "BackendState",
    "Clients",
    "Desired",
    "Frontend",
    "FrontendType",
    "HealthCheck",
    "Intent",
    "IntentKind",
    "IntentRule",
    "Policy",
    "PolicyAction",
    "Ports",
    "Protocol",
    "Redirect",
    "Rule",
    "Service",
    "Splice",
    "SpliceLimits",
    "Trigger",
    "endpoint",
    "intent_for",
    "is_loopback",
    "is_mapped",
    "pack_address",
    "parse_address",
    "parse_network",
    "unpack_address",
]

NAME_MAX = 127
"""Longest service name in bytes: Kubernetes' `namespace/name`, 63 bytes each."""

WEIGHT_MAX = 65535
BACKENDS_MAX = 65535
"""Most backends of one frontend; the service word has room for 24 bits."""

_MAPPED = b"\0" * 10 + b"\xff\xff"
_MAPPED_NETWORK = ipaddress.IPv6Network("::ffff:0:0/96")


class Protocol(StrEnum):
    """Transport protocols that a frontend can have."""

    TCP = "TCP"
    UDP = "UDP"

    @property
    def number(self) -> int:
        """IPPROTO_* number (RFC 790)."""
        return socket.IPPROTO_TCP if self is Protocol.TCP else socket.IPPROTO_UDP


class BackendState(StrEnum):
    """Whether new connections may go to a backend."""

    ACTIVE = "active"
    TERMINATING = "terminating"
    QUARANTINED = "quarantined"
    MAINTENANCE = "maintenance"


class FrontendType(StrEnum):
    """Where a frontend's address comes from."""

    VIP = "VIP"
    CLUSTER_IP = "ClusterIP"
    LOAD_BALANCER = "LoadBalancer"
    EXTERNAL_IP = "ExternalIP"
    LOCAL_REDIRECT = "LocalRedirect"


class Algorithm(StrEnum):
    """How a backend is chosen for a new connection."""

    RANDOM = "random"
    ROUND_ROBIN = "round-robin"
    MAGLEV = "maglev"
    LEAST_CONNECTIONS = "least-connections"


class Trigger(StrEnum):
    """What befalls live sockets: their backend leaves or changes state, or a policy forbids them.

    `removed`: the backend is no longer one of this service, whatever else it still serves.
    """

    REMOVED = "removed"
    TERMINATING = "terminating"
    QUARANTINED = "quarantined"
    MAINTENANCE = "maintenance"
    DENIED = "denied"


class IntentKind(StrEnum):
    """What should become of live sockets."""

    LEAVE = "leave"
    DRAIN = "drain"
    SEVER = "sever"
    RESTEER = "resteer"


class Intent(msgspec.Struct, frozen=True):
    """What should become of live sockets, and when.

    For `drain`: after `after` seconds those are ended that make no progress, and after `deadline`
    seconds all that are left; None: never. Both count from the change. Else both are not used.
    """

    kind: IntentKind
    after: float = 0.0
    deadline: float | None = None

    def __str__(self) -> str:
        if self.kind is not IntentKind.DRAIN:
            return self.kind
        deadline = "" if self.deadline is None else f", deadline {self.deadline:g}s"
        return f"drain {self.after:g}s{deadline}"


class IntentRule(msgspec.Struct, frozen=True):
    """The intent of a service for one protocol and trigger."""

    protocol: Protocol
    trigger: Trigger
    intent: Intent


class Backend(msgspec.Struct, frozen=True, order=True, gc=False):
    """An address and port where a server listens.

    `address` is canonical text (see :func:`parse_address`), `port` 1–65535,
    `weight` 0–65535 (0: no new connections).
    """

    address: str
    port: int
    state: BackendState = BackendState.ACTIVE
    weight: int = 1

    def __str__(self) -> str:
        return endpoint(self.address, self.port)


class Frontend(msgspec.Struct, frozen=True, order=True):
    """What clients dial, with the backends that may serve it.

    Every backend's address fits the frontend: an IPv4 frontend has IPv4 backends only; an
    IPv6 one has IPv6 backends, or, where there are none, IPv4 ones reached as mapped addresses.
    """

    address: str
    port: int
    protocol: Protocol
    type: FrontendType = FrontendType.VIP
    port_name: str = ""
    backends: tuple[Backend, ...] = ()

    @property
    def key(self) -> tuple[str, int, Protocol]:
        """What makes a frontend unique on a node."""
        return self.address, self.port, self.protocol

    def __str__(self) -> str:
        return f"{endpoint(self.address, self.port)}/{self.protocol.lower()}"


class Clients(msgspec.Struct, frozen=True):
    """Whose connections a service balances.

    `namespaces`: those of the host's network namespace, of all, or of those at these paths
    (nsfs: /run/netns/NAME, /proc/PID/ns/net). None: loopback frontends are the host's only, since
    loopback is local; all others are for every namespace.
    `cgroups`: only those below these paths, anywhere if there are none; `exclude`: not those
    below these. Paths begin at the cgroup2 root; `pod:UID` is where the kubelet has put a Pod.
    """

    namespaces: Literal["host", "all"] | tuple[str, ...] | None = None
    cgroups: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    def __str__(self) -> str:
        chosen = self.namespaces
        spaces = (chosen or "all",) if not isinstance(chosen, tuple) else chosen
        return ",".join((*spaces, *self.cgroups, *(f"!{path}" for path in self.exclude)))


class Splice(StrEnum):
    """Whether connections of a service skip the TCP stack where both ends are on this node."""

    OFF = "off"
    ON = "on"
    AUTO = "auto"


class SpliceLimits(msgspec.Struct, frozen=True):
    """When what is spliced goes back to the stack, in bytes.

    `budget`: that may go one way without an answer. So that messages of 64 KiB there and back, some
    of them at once, stay spliced. What is unread is limited apart from that, by half of the
    receive buffer (64 KiB by default).
    `leave_after`: that a stream has sent by the stack when it takes the other direction with it.
    """

    budget: int = 256 << 10
    leave_after: int = 1 << 20


class HealthCheck(msgspec.Struct, frozen=True):
    """What an active backend has to answer for new connections to go to it.

    `path`: of an HTTP GET, answered with 200 to 399; empty: a TCP connection is enough. `port` 0:
    the backend's own. `interval` and `timeout` in seconds. It counts as unhealthy after `fall`
    failures in a row, and as healthy after `rise` successes.
    """

    path: str = ""
    port: int = 0
    interval: float = 5.0
    timeout: float = 1.0
    rise: int = 2
    fall: int = 3

    def __str__(self) -> str:
        where = f" at port {self.port}" if self.port else ""
        return f"GET {self.path}{where}" if self.path else f"TCP connect{where}"


class Service(msgspec.Struct, frozen=True):
    """A name, its frontends and how a backend is chosen for a client.

    `affinity_seconds`: how long a client stays with its backend, 0 for not at all.
    `fallback`: the states, in this order, whose backends serve where none is active.
    `reserve`: whether sockets are kept from binding to the frontends.
    `clients`: None is the same as a :class:`Clients` that says nothing.
    `intents`: what it says for :func:`intent_for`, each protocol and trigger at most once.
    `splice`: None is off unless the client's namespace or cgroup is opted in; OFF is always off.
    `splice_limits` are for what is spliced by it.
    `health`: how its active backends are checked; None: they are not.
    """

    name: str
    frontends: tuple[Frontend, ...] = ()
    algorithm: Algorithm = Algorithm.RANDOM
    affinity_seconds: int = 0
    fallback: tuple[BackendState, ...] = (BackendState.TERMINATING,)
    reserve: bool = False
    clients: Clients | None = None
    intents: tuple[IntentRule, ...] = ()
    splice: Splice | None = None
    splice_limits: SpliceLimits = SpliceLimits()
    health: HealthCheck | None = None


class PolicyAction(StrEnum):
    """What a policy does with the destinations that its rules name."""

    ALLOW = "allow"
    DENY = "deny"


class Ports(msgspec.Struct, frozen=True, order=True):
    """Ports from `first` to `last`, of one protocol or of both."""

    protocol: Protocol | None = None
    first: int = 1
    last: int = 65535

    def __str__(self) -> str:
        numbers = f"{self.first}-{self.last}" if self.last > self.first else str(self.first)
        return f"{numbers}/{self.protocol.lower() if self.protocol else 'tcp+udp'}"


class Rule(msgspec.Struct, frozen=True, order=True):
    """Destinations: the addresses of a network but not of those in `excluded`, at these ports.

    Networks are canonical text (see :func:`parse_network`). No `ports`: every port.
    """

    cidr: str
    excluded: tuple[str, ...] = ()
    ports: tuple[Ports, ...] = ()

    def __str__(self) -> str:
        excluded = "".join(f"!{network}" for network in self.excluded)
        return " ".join([self.cidr + excluded, *map(str, self.ports)])


class Policy(msgspec.Struct, frozen=True):
    """Where sockets may connect and send to; it speaks of what they reach after balancing.

    A denial forbids its clients what its rules name. A client of any that allow may reach only
    what one of these names. Denials win. `clients`: None or without namespaces: those of all.
    `refused`: what of it cannot be enforced; if there is anything, none of it is.
    """

    name: str
    action: PolicyAction
    rules: tuple[Rule, ...] = ()
    clients: Clients | None = None
    refused: tuple[str, ...] = ()


class Redirect(msgspec.Struct, frozen=True):
    """A LocalRedirectPolicy: who dials its frontends is served by backends on this node.

    Sockets made in the cgroups `exempt`, or below them, are served as if it were not there: those
    of the local backends, which may dial the same address. `refused` as in :class:`Policy`.
    """

    name: str
    frontends: tuple[Frontend, ...] = ()
    exempt: tuple[str, ...] = ()
    refused: tuple[str, ...] = ()


class Desired(msgspec.Struct, frozen=True):
    """All that the sources ask for; frontends are unique across services, and across redirects."""

    services: tuple[Service, ...] = ()
    policies: tuple[Policy, ...] = ()
    redirects: tuple[Redirect, ...] = ()

    def frontends(self) -> Iterable[tuple[Service, Frontend]]:
        """Each frontend with the service that owns it."""
        for service in self.services:
            for frontend in service.frontends:
                yield service, frontend


def intent_for(rules: Iterable[IntentRule], protocol: Protocol, trigger: Trigger) -> Intent:
    """Return what should become of live sockets of a service that has these *rules*.

    Where they say nothing: a TCP connection to a backend that has left its service may still be in
    use, so it ends only once its peer is silent. A backend in another state is still there, and
    finishes what it has begun. Connected UDP cannot tell that nobody listens: it moves to where
    somebody does, but not from a backend in maintenance, which a person has asked for and which
    still answers. What a policy forbids ends at once.

    TCP cannot be moved to another peer: there `resteer` means `sever`.
    """
    for rule in rules:
        if rule.protocol is protocol and rule.trigger is trigger:
            if protocol is Protocol.TCP and rule.intent.kind is IntentKind.RESTEER:
                return _SEVER
            return rule.intent
    return _DEFAULT_INTENTS[protocol, trigger]


_LEAVE, _SEVER, _RESTEER = map(Intent, (IntentKind.LEAVE, IntentKind.SEVER, IntentKind.RESTEER))
_DEFAULT_INTENTS = {
    (Protocol.TCP, Trigger.REMOVED): Intent(IntentKind.DRAIN, after=30.0),
    (Protocol.TCP, Trigger.TERMINATING): _LEAVE,
    (Protocol.TCP, Trigger.QUARANTINED): _LEAVE,
    (Protocol.TCP, Trigger.MAINTENANCE): _LEAVE,
    (Protocol.TCP, Trigger.DENIED): _SEVER,
    (Protocol.UDP, Trigger.REMOVED): _RESTEER,
    (Protocol.UDP, Trigger.TERMINATING): _RESTEER,
    (Protocol.UDP, Trigger.QUARANTINED): _RESTEER,
    (Protocol.UDP, Trigger.MAINTENANCE): _LEAVE,
    (Protocol.UDP, Trigger.DENIED): _SEVER,
}


def endpoint(address: str, port: int) -> str:
    """Return `address:port`, an IPv6 address in brackets (RFC 3986, 3.2.2)."""
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def parse_address(text: str) -> str:
    """Return the canonical text of an IPv4 or IPv6 address; an IPv4-mapped one becomes IPv4.

    Raises ValueError for anything else: names, zone ids, prefixes, short IPv4 forms.
    """
    try:
        return unpack_address(pack_address(text))
    except (OSError, ValueError):
        raise ValueError(f"{text!r} is not an IPv4 or IPv6 address") from None


def parse_network(text: str) -> str:
    """Return the canonical text of an IPv4 or IPv6 network, `10.0.0.0/8`; mapped becomes IPv4.

    Raises ValueError for anything else: an address without a length, one with bits beyond it.
    """
    host, slash, length = text.partition("/")
    try:
        if not slash or not length.isdecimal():
            raise ValueError
        network = ipaddress.ip_network(text)
        if network.version == 6 and network.subnet_of(_MAPPED_NETWORK):
            return f"{parse_address(host)}/{network.prefixlen - 96}"
    except (TypeError, ValueError):
        raise ValueError(f"{text!r} is not an IPv4 or IPv6 network") from None
    return str(network)


def pack_address(address: str) -> bytes:
    """Return the 16 bytes of *address*; IPv4 as ::ffff:a.b.c.d (RFC 4291, 2.5.5.2)."""
    if ":" in address:
        return socket.inet_pton(socket.AF_INET6, address)
    return _MAPPED + socket.inet_pton(socket.AF_INET, address)


def unpack_address(packed: bytes) -> str:
    """Return the canonical text of 16 bytes made by :func:`pack_address`."""
    if is_mapped(packed):
        return socket.inet_ntop(socket.AF_INET, packed[12:])
    return socket.inet_ntop(socket.AF_INET6, packed)


def is_mapped(packed: bytes) -> bool:
    """Whether 16 bytes made by :func:`pack_address` are an IPv4 address."""
    return packed.startswith(_MAPPED)


def is_loopback(address: str) -> bool:
    """Whether a canonical address is in 127.0.0.0/8 or ::1."""
    return address.startswith("127.") or address == "::1"
