"""Kubernetes Services joined with their EndpointSlices, as kube-proxy joins them.

Sources: core/v1 Service, discovery.k8s.io/v1 EndpointSlice, KEP-1669 (terminating endpoints),
KEP-1860 (ipMode), KEP-2086 (internalTrafficPolicy), and kube-proxy's choice of objects
(kubernetes/pkg/proxy).
"""

from collections.abc import Iterator
from datetime import datetime
from typing import NamedTuple, TypeAlias

from sockhop.model import (
    BACKENDS_MAX,
    Backend,
    BackendState,
    Frontend,
    FrontendType,
    Protocol,
    Service,
)
from sockhop.sources.annotations import read_annotations
from sockhop.sources.compact import AFFINITY_DEFAULT
from sockhop.sources.documents import Document
from sockhop.sources.fields import FieldError, FieldPath, parse_host, shown
from sockhop.sources.kubernetes_objects import (
    Ingress,
    Labels,
    ServiceObject,
    ServicePort,
    ServiceSpec,
    SliceObject,
)

__all__ = ["Cluster", "ClusterClaim"]


class ClusterClaim(NamedTuple):
    """A service, where it comes from, and when its object was made."""

    service: Service
    document: Document
    created: datetime | None


class _Host(NamedTuple):
    """An endpoint that serves; `node` is where it runs."""

    address: str
    state: BackendState
    node: str | None


class _Member(NamedTuple):
    backend: Backend
    node: str | None


_PortKey: TypeAlias = tuple[str, Protocol]
"""The name of a port ("" for none) and its protocol: what Services and slices share."""

_Members: TypeAlias = dict[tuple[_PortKey, bool], dict[tuple[str, int], _Member]]
"""By port and whether it is IPv6, then by address and port number."""


class Cluster:
    """The Kubernetes objects of all files; services() joins them once all are added.

    What is ignored goes to *warnings*. Every method raises InputError.
    """

    def __init__(self, node_name: str, warnings: list[str]) -> None:
        """*node_name*: whose endpoints are local, "" if that is not known."""
        self._node_name = node_name
        self._warnings = warnings
        self._services: dict[str, tuple[ServiceObject, Document]] = {}
        self._slices: dict[str, tuple[SliceObject, Document]] = {}

    def add_service(self, document: Document) -> None:
        """Add a core/v1 Service."""
        found = document.decode(ServiceObject)
        _, first = self._services.setdefault(found.name, (found, document))
        if first is not document:
            raise _twice(document, f"Service {found.name}", first)

    def add_slice(self, document: Document) -> None:
        """Add a discovery.k8s.io/v1 EndpointSlice."""
        found = document.decode(SliceObject)
        _, first = self._slices.setdefault(found.name, (found, document))
        if first is not document:
            raise _twice(document, f"EndpointSlice {found.name}", first)

    def services(self) -> Iterator[ClusterClaim]:
        """Join them. A Service without an address and port of its own is left out."""
        slices = self._slices_by_service()
        for name, (found, document) in self._services.items():
            if reason := _ignored_service(found):
                self._ignore(document, f"Service {name}", reason)
                continue
            join = _Join(found, _members(slices.get(name, ())), self._node_name)
            try:
                wishes = read_annotations(found.metadata.annotations or {})
                frontends = tuple(join.frontends())
                remarks = [*wishes.remarks, *join.remarks(frontends)]
            except FieldError as error:
                raise document.error(error) from None
            self._warnings += (f"{document.file}: Service {name}: {text}" for text in remarks)
            if frontends:
                service = Service(
                    name,
                    frontends,
                    wishes.algorithm,
                    _affinity(found.spec),
                    reserve=wishes.reserve,
                )
                yield ClusterClaim(service, document, found.metadata.creation_timestamp)
            else:
                reason = "it has no address that clients could dial, or no port"
                self._ignore(document, f"Service {name}", reason)

    def _slices_by_service(self) -> dict[str, list[tuple[SliceObject, Document]]]:
        slices: dict[str, list[tuple[SliceObject, Document]]] = {}
        for name, (found, document) in self._slices.items():
            reason = _ignored_labels(found.metadata.labels)
            if not found.service:
                reason = "it has no label kubernetes.io/service-name"
            elif found.service not in self._services:
                reason = f"there is no Service {shown(found.service)}"
            elif found.address_type == "FQDN":
                reason = "its addressType is FQDN and a backend needs an address"
            if reason:
                self._ignore(document, f"EndpointSlice {shown(name)}", reason)
            else:
                slices.setdefault(found.service, []).append((found, document))
        return slices

    def _ignore(self, document: Document, what: str, reason: str) -> None:
        self._warnings.append(f"{document.file}: {what} is ignored: {reason}")


class _Join:
    """One Service with the members of its slices."""

    def __init__(self, found: ServiceObject, members: _Members, node_name: str) -> None:
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
        yield from _remarks_on_ingress(_ingress(self._found))
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


def _members(slices: tuple[()] | list[tuple[SliceObject, Document]]) -> _Members:
    """Return the endpoints that serve; one that is in several slices counts once."""
    members: _Members = {}
    for found, document in slices:
        try:
            hosts = _hosts(found)
        except FieldError as error:
            raise document.error(error) from None
        for port in found.ports or ():
            if port.port is None or port.protocol == "SCTP":
                continue
            key = _port_key(port.name, port.protocol)
            group = members.setdefault((key, found.address_type == "IPv6"), {})
            for address, state, node in hosts:
                known = group.get((address, port.port))
                if known is None or (
                    known.backend.state is not BackendState.ACTIVE and state is BackendState.ACTIVE
                ):
                    group[address, port.port] = _Member(Backend(address, port.port, state), node)
    return members


def _hosts(found: SliceObject) -> list[_Host]:
    """Return the endpoints that serve. Raises FieldError for an address of another type."""
    hosts = []
    for index, endpoint in enumerate(found.endpoints or ()):
        text = endpoint.addresses[0]
        address = parse_host(text)
        if not address or (":" in address) != (found.address_type == "IPv6"):
            path = ("endpoints", index, "addresses", 0)
            raise FieldError(shown(text), f"an {found.address_type} address", path=path)
        conditions = endpoint.conditions
        state = conditions.state if conditions else BackendState.ACTIVE
        if state is not None:
            hosts.append(_Host(address, state, endpoint.node_name))
    return hosts


def _addresses(found: ServiceObject) -> Iterator[tuple[str, FrontendType]]:
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
    for index, ingress in enumerate(_ingress(found)):
        if ingress.ip and ingress.ip_mode != "Proxy":
            place = ("status", "loadBalancer", "ingress", index, "ip")
            texts.append((ingress.ip, FrontendType.LOAD_BALANCER, place))
    for text, kind, path in texts:
        address = parse_host(text)
        if not address:
            raise FieldError(shown(text), "an IPv4 or IPv6 address", path=path)
        yield address, kind


def _ingress(found: ServiceObject) -> list[Ingress]:
    balancer = found.status.load_balancer if found.status else None
    return (balancer.ingress if balancer else None) or []


def _ignored_service(found: ServiceObject) -> str:
    """Say why kube-proxy passes this Service over; "" if it does not."""
    if found.spec.type == "ExternalName":
        return "its type is ExternalName, a matter for DNS"
    if "None" in (found.spec.cluster_ip, *(found.spec.cluster_ips or ())):
        return "it is headless (clusterIP None)"
    return _ignored_labels(found.metadata.labels)


def _ignored_labels(labels: Labels | None) -> str:
    # A label's presence counts, not its value.
    if labels and labels.proxy_name is not None:
        return "its label service.kubernetes.io/service-proxy-name gives it to another proxy"
    if labels and labels.headless is not None:
        return "its label service.kubernetes.io/headless says that no proxy serves it"
    return ""


def _remarks_on_ports(ports: list[ServicePort]) -> Iterator[str]:
    if node_ports := [str(port.node_port) for port in ports if port.node_port]:
        word = "node port" if len(node_ports) == 1 else "node ports"
        verb = "is" if len(node_ports) == 1 else "are"
        yield f"{word} {', '.join(node_ports)} {verb} ignored: sockhop serves no node ports"
    for port in ports:
        if port.protocol == "SCTP":
            yield f"port {port.port}/SCTP is ignored: sockhop balances TCP and UDP"


def _remarks_on_ingress(ingresses: list[Ingress]) -> Iterator[str]:
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


def _twice(document: Document, what: str, first: Document) -> Exception:
    error = FieldError(
        f"{what}, which is at {first.place()} too", "each object once", path=("metadata", "name")
    )
    return document.error(error)
