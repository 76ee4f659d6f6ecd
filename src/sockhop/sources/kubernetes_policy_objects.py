"""The Kubernetes objects that say who may connect where: what of them matters, as types.

networking.k8s.io/v1 NetworkPolicy, core/v1 Pod, and our own sockhop.io/v1alpha1
LocalRedirectPolicy. A null is as good as no field, as the API server has it.
"""

from typing import Annotated, Any, Literal

from msgspec import Meta, Struct, field

from sockhop.sources.kubernetes_objects import Namespace, ObjectName, Port, TransportProtocol

__all__ = [
    "CGROUP_ANNOTATION",
    "EgressRule",
    "LabelSelector",
    "PodObject",
    "PolicyObject",
    "PolicyPort",
    "RedirectBackend",
    "RedirectFrontend",
    "RedirectObject",
    "RedirectPort",
]

CGROUP_ANNOTATION = "sockhop.io/cgroup"
"""Of a Pod: the path of its cgroup, from the cgroup2 root."""

_CONFIG_HASH = "kubernetes.io/config.hash"


class Requirement(Struct, frozen=True):
    """metav1.LabelSelectorRequirement."""

    key: str
    operator: Literal["In", "NotIn", "Exists", "DoesNotExist"]
    values: list[str] | None = None

    def matches(self, labels: dict[str, str]) -> bool:
        """Whether *labels* fulfil it; a label that is not there is in no list."""
        if self.operator in ("Exists", "DoesNotExist"):
            return (self.key in labels) == (self.operator == "Exists")
        listed = labels.get(self.key) in (self.values or ())
        return listed == (self.operator == "In")


class LabelSelector(Struct, frozen=True, rename="camel"):
    """metav1.LabelSelector. An empty one selects everything."""

    match_labels: dict[str, str] | None = None
    match_expressions: list[Requirement] | None = None

    def matches(self, labels: dict[str, str]) -> bool:
        """Whether it selects an object with these labels."""
        wanted = self.match_labels or {}
        return all(labels.get(key) == value for key, value in wanted.items()) and all(
            requirement.matches(labels) for requirement in self.match_expressions or ()
        )


class _Meta(Struct, frozen=True):
    """metav1.ObjectMeta."""

    name: ObjectName
    namespace: Namespace | None = None
    labels: dict[str, str] | None = None
    annotations: Annotated[dict[str, Any], Meta(description="a mapping")] | None = None
    uid: str | None = None


class _Named(Struct, frozen=True):
    metadata: _Meta

    @property
    def namespace(self) -> str:
        return self.metadata.namespace or "default"

    @property
    def name(self) -> str:
        return f"{self.namespace}/{self.metadata.name}"


class IpBlock(Struct, frozen=True):
    """networking.k8s.io/v1 IPBlock."""

    cidr: str
    excluded: list[str] | None = field(name="except", default=None)


class Peer(Struct, frozen=True, rename="camel"):
    """networking.k8s.io/v1 NetworkPolicyPeer."""

    ip_block: IpBlock | None = None
    pod_selector: LabelSelector | None = None
    namespace_selector: LabelSelector | None = None


class PolicyPort(Struct, frozen=True, rename="camel"):
    """networking.k8s.io/v1 NetworkPolicyPort."""

    port: Annotated[Port | str, Meta(description="a port from 1 to 65535, or its name")] | None = (
        None
    )
    end_port: Port | None = None
    protocol: TransportProtocol | None = None


class EgressRule(Struct, frozen=True):
    """networking.k8s.io/v1 NetworkPolicyEgressRule."""

    to: list[Peer] | None = None
    ports: list[PolicyPort] | None = None


class PolicySpec(Struct, frozen=True, rename="camel"):
    """networking.k8s.io/v1 NetworkPolicySpec; what it says of ingress is no matter here."""

    pod_selector: LabelSelector | None = None
    policy_types: list[Literal["Ingress", "Egress"]] | None = None
    ingress: list[Any] | None = None
    egress: list[EgressRule] | None = None


class PolicyObject(_Named, frozen=True):
    """networking.k8s.io/v1 NetworkPolicy."""

    spec: PolicySpec


class PodSpec(Struct, frozen=True, rename="camel"):
    """core/v1 PodSpec."""

    node_name: str | None = None


class PodIp(Struct, frozen=True):
    """core/v1 PodIP."""

    ip: str | None = None


class PodStatus(Struct, frozen=True):
    """core/v1 PodStatus."""

    phase: str | None = None
    pod_ip: str | None = field(name="podIP", default=None)
    pod_ips: list[PodIp] | None = field(name="podIPs", default=None)


class PodObject(_Named, frozen=True):
    """core/v1 Pod."""

    spec: PodSpec | None = None
    status: PodStatus | None = None

    @property
    def cgroup(self) -> str:
        """Where its cgroup is: a path; `pod:UID` where the kubelet chose it; "" if unknown."""
        annotations = self.metadata.annotations or {}
        if CGROUP_ANNOTATION in annotations:
            return str(annotations[CGROUP_ANNOTATION])
        uid = annotations.get(_CONFIG_HASH) or self.metadata.uid
        return f"pod:{uid}" if uid else ""

    @property
    def addresses(self) -> tuple[str, ...]:
        """Its addresses as written."""
        if self.status is None:
            return ()
        several = [found.ip for found in self.status.pod_ips or () if found.ip]
        return tuple(several or ([self.status.pod_ip] if self.status.pod_ip else []))

    @property
    def is_over(self) -> bool:
        """Whether all its containers have ended for good."""
        return self.status is not None and self.status.phase in ("Succeeded", "Failed")


class RedirectPort(Struct, frozen=True, forbid_unknown_fields=True):
    """A port of a frontend or a backend; `name` tells which belong together."""

    port: Port
    protocol: Literal["TCP", "UDP"] | None = None
    name: str | None = None


class AddressMatcher(Struct, frozen=True, forbid_unknown_fields=True, rename="camel"):
    """An address and ports that clients dial."""

    ip: str
    to_ports: Annotated[
        list[RedirectPort], Meta(min_length=1, description="a list of one or more ports")
    ]


class ServiceMatcher(Struct, frozen=True, forbid_unknown_fields=True, rename="camel"):
    """A Service, all of its ports or those listed."""

    service_name: ObjectName
    namespace: Namespace | None = None
    to_ports: list[RedirectPort] | None = None


class RedirectFrontend(Struct, frozen=True, forbid_unknown_fields=True, rename="camel"):
    """What is redirected: one of the two."""

    address_matcher: AddressMatcher | None = None
    service_matcher: ServiceMatcher | None = None


class RedirectBackend(Struct, frozen=True, forbid_unknown_fields=True, rename="camel"):
    """Where to: Pods of this node by their labels, or addresses."""

    to_ports: Annotated[
        list[RedirectPort], Meta(min_length=1, description="a list of one or more ports")
    ]
    local_endpoint_selector: LabelSelector | None = None
    addresses: list[str] | None = None
    cgroups: list[str] | None = None


class RedirectSpec(Struct, frozen=True, forbid_unknown_fields=True, rename="camel"):
    """What our LocalRedirectPolicy asks for."""

    redirect_frontend: RedirectFrontend
    redirect_backend: RedirectBackend


class RedirectObject(_Named, frozen=True):
    """sockhop.io/v1alpha1 LocalRedirectPolicy."""

    spec: RedirectSpec
