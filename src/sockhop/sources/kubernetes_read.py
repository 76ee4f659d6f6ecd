"""Kubernetes Services and EndpointSlices as they are kept: what the join needs, and where from."""

import sys
from collections.abc import Sequence
from datetime import datetime
from typing import NamedTuple

from sockhop.model import BackendState
from sockhop.sources.annotations import Wishes, read_annotations
from sockhop.sources.documents import Document, Place
from sockhop.sources.fields import FieldError, parse_host, shown
from sockhop.sources.kubernetes_objects import (
    Ingress,
    Labels,
    ServiceObject,
    ServiceSpec,
    SliceObject,
    SlicePort,
)

__all__ = ["ClusterService", "ClusterSlice", "Host", "read_service", "read_slice"]


class ClusterService(NamedTuple):
    """A core/v1 Service; `ignored` says why kube-proxy passes it over, "" if it does not."""

    name: str
    spec: ServiceSpec
    ingress: Sequence[Ingress]
    wishes: Wishes
    created: datetime | None
    ignored: str
    place: Place


class Host(NamedTuple):
    """An endpoint that serves; `node` is where it runs."""

    address: str
    state: BackendState
    node: str | None


class ClusterSlice(NamedTuple):
    """A discovery.k8s.io/v1 EndpointSlice.

    `service` is the name of its Service, "" for none; `ignored` says why kube-proxy passes it
    over, "" if it does not.
    """

    name: str
    service: str
    ipv6: bool
    hosts: tuple[Host, ...]
    ports: Sequence[SlicePort]
    ignored: str
    place: Place


def read_service(document: Document) -> ClusterService:
    """Read a core/v1 Service. Raises InputError."""
    found = document.decode(ServiceObject)
    try:
        wishes = read_annotations(found.metadata.annotations or {})
    except FieldError as error:
        raise document.error(error) from None
    balancer = found.status.load_balancer if found.status else None
    return ClusterService(
        found.name,
        found.spec,
        (balancer.ingress if balancer else None) or (),
        wishes,
        found.metadata.creation_timestamp,
        _ignored_service(found),
        document.place,
    )


def read_slice(document: Document) -> ClusterSlice:
    """Read a discovery.k8s.io/v1 EndpointSlice. Raises InputError."""
    found = document.decode(SliceObject)
    ignored = _ignored_labels(found.metadata.labels)
    if found.address_type == "FQDN":
        ignored = "its addressType is FQDN and a backend needs an address"
    try:
        hosts = () if ignored else _hosts(found)
    except FieldError as error:
        raise document.error(error) from None
    return ClusterSlice(
        found.name,
        found.service,
        found.address_type == "IPv6",
        hosts,
        found.ports or (),
        ignored,
        document.place,
    )


def _hosts(found: SliceObject) -> tuple[Host, ...]:
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
            # Thousands of endpoints share a few nodes.
            node = endpoint.node_name and sys.intern(endpoint.node_name)
            hosts.append(Host(address, state, node))
    return tuple(hosts)


def _ignored_service(found: ServiceObject) -> str:
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
