"""Kubernetes Services joined with their EndpointSlices, as kube-proxy joins them.

Sources: core/v1 Service, discovery.k8s.io/v1 EndpointSlice, KEP-1669 (terminating endpoints),
KEP-1860 (ipMode), KEP-2086 (internalTrafficPolicy), and kube-proxy's choice of objects
(kubernetes/pkg/proxy).
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple, TypeAlias, TypeVar

from sockhop.errors import InputError
from sockhop.model import (
    BACKENDS_MAX,
    Backend,
    BackendState,
    Frontend,
    FrontendType,
    Protocol,
    Service,
)
from sockhop.sources.compact import AFFINITY_DEFAULT, FrontendKeys
from sockhop.sources.documents import Place
from sockhop.sources.fields import FieldError, FieldPath, parse_host, shown
from sockhop.sources.kubernetes_objects import Ingress, ServicePort, ServiceSpec
from sockhop.sources.kubernetes_read import ClusterService, ClusterSlice

__all__ = ["ClusterClaim", "Joiner"]

_T = TypeVar("_T", ClusterService, ClusterSlice)


class _Member(NamedTuple):
    backend: Backend
    node: str | None


_PortKey: TypeAlias = tuple[str, Protocol]
"""The name of a port ("" for none) and its protocol: what Services and slices share."""

_Members: TypeAlias = dict[tuple[_PortKey, bool], dict[tuple[str, int], _Member]]
"""By port and whether it is IPv6, then by address and port number."""


class ClusterClaim(NamedTuple):
    """What became of a Service and its slices.

    `service` is None where there is nothing to balance; `keys` are those of its frontends;
    `warnings` say what is ignored, and why.
    """

    found: ClusterService
    slices: list[ClusterSlice]
    service: Service | None
    keys: FrontendKeys
    warnings: tuple[str, ...]


class Joiner:
    """Joins Services with their slices; each anew only when one of its objects differs."""

    def __init__(self, node_name: str) -> None:
        """*node_name*: whose endpoints are local, "" if that is not known."""
        self._node_name = node_name
        self._claims: dict[str, ClusterClaim] = {}

    def join(
        self,
        services: Iterable[ClusterService],
        slices: Iterable[ClusterSlice],
        warnings: list[str],
    ) -> Iterable[ClusterClaim]:
        """Return what became of each Service, in their order. Raises InputError.

        Slices that are ignored go to *warnings*.
        """
        by_name = _by_name("Service", services)
        groups = _group(by_name, _by_name("EndpointSlice", slices).values(), warnings)
        claims: dict[str, ClusterClaim] = {}
        for name, found in by_name.items():
            claim = self._claims.get(name)
            if claim is None or claim.found != found or claim.slices != groups[name]:
                claim = self._claim(found, groups[name], claim)
            claims[name] = claim
        self._claims = claims
        return claims.values()

    def _claim(
        self, found: ClusterService, slices: list[ClusterSlice], before: ClusterClaim | None
    ) -> ClusterClaim:
        if found.ignored:
            return _ignore(found, slices, found.ignored)
        join = _Join(found, _members(slices), self._node_name)
        try:
            frontends = tuple(join.frontends())
        except FieldError as error:
            raise found.place.error(error) from None
        remarks = [*found.wishes.remarks, *join.remarks(frontends)]
        if not frontends:
            return _ignore(
                found, slices, "it has no address that clients could dial, or no port", remarks
            )
        service = Service(
            found.name,
            frontends,
            found.wishes.algorithm,
            _affinity(found.spec),
            reserve=found.wishes.reserve,
            intents=found.wishes.intents,
            splice=found.wishes.splice.mode,
            splice_limits=found.wishes.splice.limits,
        )
        if before and before.service == service:
            service = before.service
        keys = frozenset(frontend.key for frontend in frontends)
        return ClusterClaim(found, slices, service, keys, _warnings(found, remarks))


def _by_name(kind: str, objects: Iterable[_T]) -> dict[str, _T]:
    """Return objects by name. Raises InputError for one that is there twice."""
    by_name: dict[str, _T] = {}
    for found in objects:
        first = by_name.setdefault(found.name, found)
        if first is not found:
            raise _twice(found.place, f"{kind} {found.name}", first.place)
    return by_name


def _group(
    services: Mapping[str, ClusterService], slices: Iterable[ClusterSlice], warnings: list[str]
) -> dict[str, list[ClusterSlice]]:
    """Return the slices of each Service; those that are ignored go to *warnings*."""
    groups: dict[str, list[ClusterSlice]] = {name: [] for name in services}
    for found in slices:
        group = groups.get(found.service)
        if group is not None and not found.ignored:
            group.append(found)
            continue
        if not found.service:
            reason = "it has no label kubernetes.io/service-name"
        elif group is None:
            reason = f"there is no Service {shown(found.service)}"
        else:
            reason = found.ignored
        what = f"EndpointSlice {shown(found.name)}"
        warnings.append(f"{found.place.file}: {what} is ignored: {reason}")
    return groups


def _ignore(
    found: ClusterService, slices: list[ClusterSlice], reason: str, remarks: Sequence[str] = ()
) -> ClusterClaim:
    warnings = _warnings(found, remarks)
    last = f"{found.place.file}: Service {found.name} is ignored: {reason}"
    return ClusterClaim(found, slices, None, frozenset(), (*warnings, last))


def _warnings(found: ClusterService, remarks: Iterable[str]) -> tuple[str, ...]:
    return tuple(f"{found.place.file}: Service {found.name}: {text}" for text in remarks)


class _Join:
    """One Service with the members of its slices."""

    def __init__(self, found: ClusterService, members: _Members, node_name: str) -> None:
        self._found = found
        self._ports = found.spec.ports or []
        self._members = members
        self._node_name = node_name

    def frontends(self) -> Iterator[Frontend]:
        """Each address with each port. Raises FieldError."""
        only_local = self._found.spec.internal_traffic_policy == "Local" and self._node_name != ""
        chosen: dict[tuple[_PortKey, bool, bool], tuple[Backend, ...]] = {}
        for address, kind in _addresses(self._found):
            for number, port in enumerate(self._ports):
                if port.protocol == "SCTP":
                    continue
                key = _port_key(port.name, port.protocol)
                # The policy speaks of the cluster IP only.
                choice = (key, ":" in address, only_local and kind is FrontendType.CLUSTER_IP)
                if choice not in chosen:
                    chosen[choice] = self._backends(*choice)
                if len(chosen[choice]) > BACKENDS_MAX:
                    found = f"{len(chosen[choice])} endpoints"
                    raise FieldError(
                        found, f"no more than {BACKENDS_MAX}", path=("spec", "ports", number)
                    )
                yield Frontend(address, port.port, key[1], kind, key[0], chosen[choice])

    def remarks(self, frontends: tuple[Frontend, ...]) -> Iterator[str]:
        """Say what of the Service has no effect, and why."""
        spec = self._found.spec
        yield from _remarks_on_ports(self._ports)
        yield from _remarks_on_ingress(self._found.ingress)
        if spec.load_balancer_source_ranges:
            yield "loadBalancerSourceRanges is ignored: sockhop serves the clients on its node"
        if spec.traffic_distribution:
            yield "trafficDistribution is ignored: zones and hints are not known to sockhop"
        if spec.internal_traffic_policy == "Local" and not self._node_name:
            yield ("internalTrafficPolicy Local is ignored: no node name is given (--node-name)")
        yield from self._unmatched_ports()
        yield from self._wrong_families(frontends)

    def _backends(self, key: _PortKey, ipv6: bool, only_local: bool) -> tuple[Backend, ...]:
        members = self._members.get((key, ipv6), {}).values()
        return tuple(
            member.backend for member in members if not only_local or member.node == self._node_name
        )

    def _unmatched_ports(self) -> Iterator[str]:
        known = {key for key, _ in self._members}
        for port in self._ports:
            key = _port_key(port.name, port.protocol) if port.protocol != "SCTP" else None
            if known and key and key not in known:
                others = ", ".join(sorted(f"{shown(name)} {protocol}" for name, protocol in known))
                yield (
                    f"port {port.port} has no backend: no EndpointSlice has a port "
                    f"{shown(key[0])} {key[1]}, only {others}"
                )

    def _wrong_families(self, frontends: tuple[Frontend, ...]) -> Iterator[str]:
        for frontend in frontends:
            ipv6 = ":" in frontend.address
            key = (frontend.port_name, frontend.protocol)
            if self._members.get((key, not ipv6)) and not self._members.get((key, ipv6)):
                family, other = ("IPv6", "IPv4") if ipv6 else ("IPv4", "IPv6")
                yield f"frontend {frontend} has no backend: its endpoints are {other}, not {family}"


def _members(slices: Iterable[ClusterSlice]) -> _Members:
    """Return the endpoints that serve; one that is in several slices counts once."""
    members: _Members = {}
    for found in slices:
        for port in found.ports:
            if port.port is None or port.protocol == "SCTP":
                continue
            key = _port_key(port.name, port.protocol)
            group = members.setdefault((key, found.ipv6), {})
            for address, state, node in found.hosts:
                known = group.get((address, port.port))
                if known is None or (
                    known.backend.state is not BackendState.ACTIVE and state is BackendState.ACTIVE
                ):
                    group[address, port.port] = _Member(Backend(address, port.port, state), node)
    return members


def _addresses(found: ClusterService) -> Iterator[tuple[str, FrontendType]]:
    """Return the addresses that clients dial. Raises FieldError."""
    spec = found.spec
    texts: list[tuple[str, FrontendType, FieldPath]] = []
    if spec.cluster_ips:
        for index, text in enumerate(spec.cluster_ips):
            texts.append((text, FrontendType.CLUSTER_IP, ("spec", "clusterIPs", index)))
    elif spec.cluster_ip:
        texts.append((spec.cluster_ip, FrontendType.CLUSTER_IP, ("spec", "clusterIP")))
    for index, text in enumerate(spec.external_ips or ()):
        texts.append((text, FrontendType.EXTERNAL_IP, ("spec", "externalIPs", index)))
    for index, ingress in enumerate(found.ingress):
        if ingress.ip and ingress.ip_mode != "Proxy":
            place = ("status", "loadBalancer", "ingress", index, "ip")
            texts.append((ingress.ip, FrontendType.LOAD_BALANCER, place))
    for text, kind, path in texts:
        address = parse_host(text)
        if not address:
            raise FieldError(shown(text), "an IPv4 or IPv6 address", path=path)
        yield address, kind


def _remarks_on_ports(ports: list[ServicePort]) -> Iterator[str]:
    if node_ports := [str(port.node_port) for port in ports if port.node_port]:
        word = "node port" if len(node_ports) == 1 else "node ports"
        verb = "is" if len(node_ports) == 1 else "are"
        yield f"{word} {', '.join(node_ports)} {verb} ignored: sockhop serves no node ports"
    for port in ports:
        if port.protocol == "SCTP":
            yield f"port {port.port}/SCTP is ignored: sockhop balances TCP and UDP"


def _remarks_on_ingress(ingresses: Iterable[Ingress]) -> Iterator[str]:
    for ingress in ingresses:
        if ingress.ip and ingress.ip_mode == "Proxy":
            yield f"load balancer address {shown(ingress.ip)} is ignored: its ipMode is Proxy"
        elif ingress.hostname and not ingress.ip:
            yield (
                f"load balancer {shown(ingress.hostname)} is ignored: it has a name and no address"
            )


def _affinity(spec: ServiceSpec) -> int:
    """Return the affinity in seconds."""
    if spec.session_affinity != "ClientIP":
        return 0
    config = spec.session_affinity_config
    client = config.client_ip if config else None
    return (client.timeout_seconds if client else None) or AFFINITY_DEFAULT


def _port_key(name: str | None, protocol: str | None) -> _PortKey:
    return name or "", Protocol(protocol or "TCP")


def _twice(place: Place, what: str, first: Place) -> InputError:
    error = FieldError(
        f"{what}, which is at {first.title()} too", "each object once", path=("metadata", "name")
    )
    return place.error(error)
