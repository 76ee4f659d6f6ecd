"""The Kubernetes objects that say what to balance: what of them matters, as types.

Fields that are not named here may hold anything. A null is as good as no field, as the API
server has it.
"""

from datetime import datetime
from typing import Annotated, Any, Literal

from msgspec import Meta, Struct, field

from sockhop.model import BackendState
from sockhop.sources.compact import AFFINITY_MAX

__all__ = ["Ingress", "Labels", "ServiceObject", "ServicePort", "ServiceSpec", "SliceObject"]

DnsLabel = Annotated[
    str,
    Meta(
        pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?\Z",
        max_length=63,
        description="a name of 1 to 63 lower-case letters, digits and -, "
        "with a letter or digit at each end",
    ),
]
Namespace = Annotated[
    str,
    Meta(
        pattern=r"^([a-z0-9]([-a-z0-9]*[a-z0-9])?)?\Z",
        max_length=63,
        description="a name of up to 63 lower-case letters, digits and -, "
        "with a letter or digit at each end",
    ),
]
ObjectName = Annotated[str, Meta(min_length=1, max_length=253, description="a name")]
Port = Annotated[int, Meta(ge=1, le=65535, description="a port from 1 to 65535")]
Time = Annotated[
    datetime, Meta(tz=True, description='a time such as "2024-01-31T12:00:00Z", with its zone')
]
TransportProtocol = Literal["TCP", "UDP", "SCTP"]


class Labels(Struct, frozen=True, gc=False):
    """The labels that matter here; the others can be anything."""

    service_name: str | None = field(name="kubernetes.io/service-name", default=None)
    headless: str | None = field(name="service.kubernetes.io/headless", default=None)
    proxy_name: str | None = field(name="service.kubernetes.io/service-proxy-name", default=None)


class ServiceMeta(Struct, frozen=True, rename="camel"):
    """metav1.ObjectMeta of a Service, whose name is a DNS label."""

    name: DnsLabel
    namespace: Namespace | None = None
    labels: Labels | None = None
    annotations: Annotated[dict[str, Any], Meta(description="a mapping")] | None = None
    creation_timestamp: Time | None = None


class SliceMeta(Struct, frozen=True):
    """metav1.ObjectMeta of an EndpointSlice."""

    name: ObjectName
    namespace: Namespace | None = None
    labels: Labels | None = None


class ServicePort(Struct, frozen=True, gc=False, rename="camel"):
    """core/v1 ServicePort. Its targetPort is no matter: slices have the backends' ports."""

    port: Port
    name: str | None = None
    protocol: TransportProtocol | None = None
    node_port: int | None = None


class ClientIpConfig(Struct, frozen=True, gc=False):
    """core/v1 ClientIPConfig."""

    timeout_seconds: (
        Annotated[
            int,
            Meta(ge=1, le=AFFINITY_MAX, description=f"whole seconds, from 1 to {AFFINITY_MAX}"),
        ]
        | None
    ) = field(name="timeoutSeconds", default=None)


class AffinityConfig(Struct, frozen=True):
    """core/v1 SessionAffinityConfig."""

    client_ip: ClientIpConfig | None = field(name="clientIP", default=None)


class ServiceSpec(Struct, frozen=True, rename="camel"):
    """core/v1 ServiceSpec, what of it matters here."""

    type: Literal["ClusterIP", "NodePort", "LoadBalancer", "ExternalName"] | None = None
    cluster_ip: str | None = field(name="clusterIP", default=None)
    cluster_ips: list[str] | None = field(name="clusterIPs", default=None)
    external_ips: list[str] | None = field(name="externalIPs", default=None)
    ports: list[ServicePort] | None = None
    session_affinity: Literal["None", "ClientIP"] | None = None
    session_affinity_config: AffinityConfig | None = None
    internal_traffic_policy: Literal["Cluster", "Local"] | None = None
    traffic_distribution: str | None = None
    load_balancer_source_ranges: list[str] | None = None


class Ingress(Struct, frozen=True, gc=False):
    """core/v1 LoadBalancerIngress."""

    ip: str | None = None
    hostname: str | None = None
    ip_mode: str | None = field(name="ipMode", default=None)


class LoadBalancer(Struct, frozen=True):
    """core/v1 LoadBalancerStatus."""

    ingress: list[Ingress] | None = None


class ServiceStatus(Struct, frozen=True, rename="camel"):
    """core/v1 ServiceStatus."""

    load_balancer: LoadBalancer | None = None


class ServiceObject(Struct, frozen=True):
    """core/v1 Service."""

    metadata: ServiceMeta
    spec: ServiceSpec
    status: ServiceStatus | None = None

    @property
    def name(self) -> str:
        return f"{self.metadata.namespace or 'default'}/{self.metadata.name}"


class Conditions(Struct, frozen=True, gc=False):
    """discovery.k8s.io/v1 EndpointConditions."""

    ready: bool | None = None
    serving: bool | None = None
    terminating: bool | None = None

    @property
    def state(self) -> BackendState | None:
        """The state of a backend, None if it serves nobody. ready: nil is true, serving: ready."""
        if self.ready is not False:
            return BackendState.ACTIVE
        return BackendState.TERMINATING if self.serving and self.terminating else None


class Endpoint(Struct, frozen=True, rename="camel"):
    """discovery.k8s.io/v1 Endpoint. Only its first address counts, as for kube-proxy."""

    addresses: Annotated[
        list[str], Meta(min_length=1, description="a list of one or more addresses")
    ]
    conditions: Conditions | None = None
    node_name: str | None = None


class SlicePort(Struct, frozen=True, gc=False):
    """discovery.k8s.io/v1 EndpointPort. Without `port` it joins nothing."""

    name: str | None = None
    protocol: TransportProtocol | None = None
    port: Port | None = None


class SliceObject(Struct, frozen=True, rename="camel"):
    """discovery.k8s.io/v1 EndpointSlice."""

    metadata: SliceMeta
    address_type: Literal["IPv4", "IPv6", "FQDN"]
    endpoints: list[Endpoint] | None = None
    ports: list[SlicePort] | None = None

    @property
    def name(self) -> str:
        return f"{self.metadata.namespace or 'default'}/{self.metadata.name}"

    @property
    def service(self) -> str:
        """The name of its Service, "" if it names none."""
        name = self.metadata.labels and self.metadata.labels.service_name
        return f"{self.metadata.namespace or 'default'}/{name}" if name else ""
