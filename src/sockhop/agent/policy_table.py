"""Policies as tables that the hooks can look things up in: pure, and readable in user space too.

Policies that select the same sockets become one set of rules. Of a set, addresses for which the
same rules count are one class, found by the longest prefix; of a class, the longest prefix of the
port gives the verdict. So a verdict takes the same few look-ups however many policies there are.
"""

import ipaddress
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import PurePosixPath
from typing import NamedTuple, TypeAlias, TypeVar

from sockhop.model import Clients, Policy, PolicyAction, Protocol, Rule, is_mapped, pack_address

__all__ = [
    "OTHER_PROTOCOLS",
    "Client",
    "Judge",
    "Network",
    "Place",
    "PolicyTable",
    "PortPrefix",
    "Verdict",
    "compile_policies",
]

OTHER_PROTOCOLS = 0
"""Stands for protocols that are neither TCP nor UDP; their port is 0."""

_PROTOCOLS: dict[int, Protocol | None] = {
    **{protocol.number: protocol for protocol in Protocol},
    OTHER_PROTOCOLS: None,
}
_PORT_BITS = 16
_PORTS = 1 << _PORT_BITS
_ROOT = PurePosixPath("/")


class Place(NamedTuple):
    """A cgroup that a policy names: its id, and its path from the cgroup2 root."""

    id: int
    path: PurePosixPath


class Client(NamedTuple):
    """Whose sockets, by netns cookie and cgroup id; 0 for all that have no entry of their own."""

    netns: int
    cgroup: int


class Network(NamedTuple):
    """The first `length` bits of a 16-byte address."""

    address: bytes
    length: int


class PortPrefix(NamedTuple):
    """The first `length` bits of a port, of an IPPROTO_* number or OTHER_PROTOCOLS."""

    protocol: int
    port: int
    length: int


class Verdict(NamedTuple):
    """Whether a socket is denied something, and by which policy."""

    denied: bool
    policy: str


_Prefix = TypeVar("_Prefix", Network, PortPrefix)
_V = TypeVar("_V")
_Ports: TypeAlias = tuple[tuple[PortPrefix, Verdict], ...]
_ALLOWED = Verdict(False, "")


class PolicyTable(NamedTuple):
    """What is in force. `sets` are of networks with positions in `classes`.

    `clients` has positions in `sets`, None where no policy is for them; it has (0, 0) if there is
    any policy at all.
    """

    clients: dict[Client, int | None]
    sets: tuple[tuple[tuple[Network, int], ...], ...]
    classes: tuple[_Ports, ...]

    def __bool__(self) -> bool:
        return bool(self.clients)

    def denying(self) -> set[Network]:
        """Return the networks in which somebody is denied something, without those inside others.

        Those that are within one whose rules deny something are not named.
        """
        found: set[Network] = set()
        for networks in self.sets:
            last: Network | None = None
            # What contains a network comes before it.
            for network, group in networks:
                if last is not None and _contains(last, network):
                    continue
                if any(verdict.denied for _, verdict in self.classes[group]):
                    last = network
                    found.add(network)
        return found

    def names(self) -> set[str]:
        """Return the policies that can deny something."""
        return {verdict.policy for ports in self.classes for _, verdict in ports} - {""}


class Judge:
    """Looks a table up as the hooks do."""

    def __init__(self, table: PolicyTable) -> None:
        self._clients = table.clients
        self._sets = [_by_length(networks) for networks in table.sets]
        self._classes = [_by_length(ports) for ports in table.classes]

    def decide(
        self, netns: int, cgroups: Iterable[int], address: bytes, protocol: int, port: int
    ) -> Verdict:
        """Return what the hooks say of a socket that goes to *address* and *port*.

        *cgroups*: the ids of its own and those above it, in this order.
        """
        if Client(netns, 0) not in self._clients:
            netns = 0
        entries = (Client(netns, cgroup) for cgroup in (*cgroups, 0))
        entry = next((each for each in entries if each in self._clients), None)
        number = None if entry is None else self._clients[entry]
        if number is None:
            return _ALLOWED
        if protocol not in _PROTOCOLS:
            protocol, port = OTHER_PROTOCOLS, 0
        for length, networks in self._sets[number]:
            group = networks.get(Network(_cut(address, length), length))
            if group is not None:
                break
        else:
            return _ALLOWED
        for length, ports in self._classes[group]:
            shift = _PORT_BITS - length
            verdict = ports.get(PortPrefix(protocol, port >> shift << shift, length))
            if verdict is not None:
                return verdict
        return _ALLOWED


def compile_policies(
    policies: Iterable[Policy],
    home: int,
    spaces: Mapping[str, int],
    cgroups: Mapping[str, Place],
) -> PolicyTable:
    """Return the table of those *policies* that are not refused.

    *home*: the netns cookie of the host; *spaces* and *cgroups* have what clients name by path; a
    place that they do not have is nobody's.
    """
    enforced = [policy for policy in policies if not policy.refused]
    if not enforced:
        return PolicyTable({}, (), ())
    selectors = [_Selector(policy, home, spaces, cgroups) for policy in enforced]
    cookies = sorted({0}.union(*(each.cookies for each in selectors)))
    places = {place.path: place.id for each in selectors for place in each.places}
    sets: dict[tuple[int, ...], int] = {}
    clients: dict[Client, int | None] = {}
    for cookie in cookies:
        for path, number in (*sorted(places.items()), (_ROOT, 0)):
            chosen = tuple(i for i, each in enumerate(selectors) if each.selects(cookie, path))
            clients[Client(cookie, number)] = sets.setdefault(chosen, len(sets)) if chosen else None
    classes: dict[_Ports, int] = {}
    made = tuple(tuple(_networks([enforced[i] for i in chosen], classes)) for chosen in sets)
    return PolicyTable(clients, made, tuple(classes))


class _Selector:
    """Which sockets a policy is for."""

    def __init__(
        self, policy: Policy, home: int, spaces: Mapping[str, int], cgroups: Mapping[str, Place]
    ) -> None:
        clients = policy.clients or Clients()
        chosen = clients.namespaces
        self._everywhere = chosen in (None, "all")
        if chosen == "host":
            self.cookies = {home}
        elif isinstance(chosen, tuple):
            self.cookies = {spaces[path] for path in chosen if path in spaces}
        else:
            self.cookies = set()
        self._unlisted = not clients.cgroups
        listed = [(path, True) for path in clients.cgroups]
        listed += [(path, False) for path in clients.exclude]
        found = [(cgroups[path], meant) for path, meant in listed if path in cgroups]
        self.places = [place for place, _ in found]
        self._says = {place.path: meant for place, meant in found}

    def selects(self, cookie: int, cgroup: PurePosixPath) -> bool:
        """Whether it is for the sockets of a namespace and a cgroup: the deepest listed decides."""
        if not self._everywhere and cookie not in self.cookies:
            return False
        for path in (cgroup, *cgroup.parents):
            if path in self._says:
                return self._says[path]
        return self._unlisted


class _Term(NamedTuple):
    """A rule with the policy that it is of."""

    policy: Policy
    rule: Rule


def _networks(
    policies: Sequence[Policy], classes: dict[_Ports, int]
) -> Iterator[tuple[Network, int]]:
    """Yield all prefixes that the policies name, each with its class; new ones go to *classes*."""
    terms = [_Term(policy, rule) for policy in policies for rule in policy.rules]
    starts: dict[Network, list[int]] = {}
    stops: dict[Network, list[int]] = {}
    for number, term in enumerate(terms):
        starts.setdefault(_network(term.rule.cidr), []).append(number)
        for text in term.rule.excluded:
            stops.setdefault(_network(text), []).append(number)
    roots = (_network("::/0"), _network("0.0.0.0/0"))
    known: dict[frozenset[int], int] = {}
    # What contains a network comes before it; the stack has those that contain the current one.
    # IPv4 begins anew: no IPv6 network contains it.
    stack: list[tuple[Network, frozenset[int]]] = []
    for network in sorted({*roots, *starts, *stops}, key=lambda n: (_is_ipv4(n), n)):
        while stack and (network == roots[1] or not _contains(stack[-1][0], network)):
            stack.pop()
        above = stack[-1][1] if stack else frozenset[int]()
        active = above.union(starts.get(network, ())) - frozenset(stops.get(network, ()))
        stack.append((network, active))
        if active not in known:
            ports = tuple(_ports(policies, [terms[i] for i in sorted(active)]))
            known[active] = classes.setdefault(ports, len(classes))
        yield network, known[active]


def _ports(
    policies: Sequence[Policy], terms: Sequence[_Term]
) -> Iterator[tuple[PortPrefix, Verdict]]:
    """Yield the verdicts on each protocol and port where these rules count."""
    allowing = [policy for policy in policies if policy.action is PolicyAction.ALLOW]
    # Who is allowed nothing is denied by the first of those that allow others something.
    default = Verdict(True, allowing[0].name) if allowing else _ALLOWED
    for number, protocol in _PROTOCOLS.items():
        spans = [(*span, term.policy) for term in terms for span in _spans(term.rule, protocol)]
        edges = sorted({0, _PORTS, *(edge for first, end, _ in spans for edge in (first, end))})
        pieces: list[tuple[int, int, Verdict]] = []
        for first, end in pairwise(edges):
            here = [policy for start, stop, policy in spans if start <= first and end <= stop]
            verdict = _verdict(here, default)
            if pieces and pieces[-1][2] == verdict:
                pieces[-1] = (pieces[-1][0], end, verdict)
            else:
                pieces.append((first, end, verdict))
        widest = max(pieces, key=lambda piece: piece[1] - piece[0])[2]
        yield PortPrefix(number, 0, 0), widest
        for first, end, verdict in pieces:
            if verdict != widest:
                for port, length in _blocks(first, end):
                    yield PortPrefix(number, port, length), verdict


def _verdict(policies: Iterable[Policy], default: Verdict) -> Verdict:
    """Return the verdict where rules of these policies count: a denial wins."""
    result = default
    for policy in policies:
        if policy.action is PolicyAction.DENY:
            return Verdict(True, policy.name)
        result = _ALLOWED
    return result


def _spans(rule: Rule, protocol: Protocol | None) -> Iterator[tuple[int, int]]:
    """Yield the ports, from and up to, that *rule* means of a protocol; None: of another."""
    if not rule.ports:
        yield 0, _PORTS
    for ports in rule.ports:
        if protocol is not None and ports.protocol in (None, protocol):
            # From 1 on is all of them: no packet goes to port 0.
            yield (ports.first if ports.first > 1 else 0), ports.last + 1


def _blocks(first: int, end: int) -> Iterator[tuple[int, int]]:
    """Yield the prefixes, port and length, that together are the ports from *first* up to *end*."""
    while first < end:
        size = first & -first or _PORTS
        while first + size > end:
            size //= 2
        yield first, _PORT_BITS - size.bit_length() + 1
        first += size


def _by_length(entries: Iterable[tuple[_Prefix, _V]]) -> list[tuple[int, dict[_Prefix, _V]]]:
    """Return the entries by the length of their prefixes, the longest first."""
    found: dict[int, dict[_Prefix, _V]] = {}
    for prefix, value in entries:
        found.setdefault(prefix.length, {})[prefix] = value
    return sorted(found.items(), reverse=True)


def _network(text: str) -> Network:
    network = ipaddress.ip_network(text)
    extra = 96 if network.version == 4 else 0
    return Network(pack_address(str(network.network_address)), network.prefixlen + extra)


def _is_ipv4(network: Network) -> bool:
    return network.length >= 96 and is_mapped(network.address)


def _contains(outer: Network, inner: Network) -> bool:
    return outer.length <= inner.length and _cut(inner.address, outer.length) == outer.address


def _cut(address: bytes, length: int) -> bytes:
    number = int.from_bytes(address, "big") >> 128 - length << 128 - length
    return number.to_bytes(16, "big")
