"""Kubernetes policies as they are kept, and NetworkPolicies in our terms.

Sources: networking.k8s.io/v1 NetworkPolicy (KEP-2079 for endPort), core/v1 Pod.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from sockhop.model import Clients, Policy, PolicyAction, Ports, Protocol, Rule
from sockhop.sources.documents import Document, Place
from sockhop.sources.fields import FieldError, FieldPath, shown
from sockhop.sources.kubernetes_policy_objects import (
    CGROUP_ANNOTATION,
    EgressRule,
    PodObject,
    PolicyObject,
    PolicyPort,
    RedirectObject,
)
from sockhop.sources.networks import EVERYWHERE, read_block

__all__ = [
    "ClusterPod",
    "ClusterPolicy",
    "ClusterRedirect",
    "join_policy",
    "local_pods",
    "read_network_policy",
    "read_pod",
    "read_redirect",
]

_LOOPBACK = (Rule("127.0.0.0/8"), Rule("::1/128"))
"""A pod can always reach itself; no NetworkPolicy forbids that."""


class ClusterPod(NamedTuple):
    """A core/v1 Pod that has not ended."""

    name: str
    namespace: str
    node: str
    labels: dict[str, str]
    cgroup: str
    addresses: tuple[str, ...]
    place: Place


class ClusterPolicy(NamedTuple):
    """A networking.k8s.io/v1 NetworkPolicy: its rules, and what of it cannot be enforced."""

    found: PolicyObject
    rules: tuple[Rule, ...]
    refused: tuple[str, ...]
    place: Place


class ClusterRedirect(NamedTuple):
    """A sockhop.io/v1alpha1 LocalRedirectPolicy."""

    found: RedirectObject
    place: Place


def read_pod(document: Document) -> ClusterPod | None:
    """Read a core/v1 Pod; None for one that is over. Raises InputError."""
    found = document.decode(PodObject)
    cgroup = found.cgroup
    if not cgroup.startswith(("/", "pod:")) and cgroup:
        path = ("metadata", "annotations", CGROUP_ANNOTATION)
        raise document.error(FieldError(shown(cgroup), 'a path that begins with "/"', path=path))
    if found.is_over:
        return None
    return ClusterPod(
        found.name,
        found.namespace,
        (found.spec.node_name if found.spec else None) or "",
        found.metadata.labels or {},
        cgroup,
        found.addresses,
        document.place,
    )


def read_redirect(document: Document) -> ClusterRedirect:
    """Read a sockhop.io/v1alpha1 LocalRedirectPolicy. Raises InputError."""
    return ClusterRedirect(document.decode(RedirectObject), document.place)


def read_network_policy(document: Document) -> ClusterPolicy:
    """Read a networking.k8s.io/v1 NetworkPolicy. Raises InputError."""
    found = document.decode(PolicyObject)
    refused: list[str] = []
    types = found.spec.policy_types
    if types is None or "Ingress" in types:
        hint = "" if types else " (without policyTypes it is meant)"
        refused.append(f"ingress{hint}: sockhop sees who connects, not who is connected to")
    rules: list[Rule] = []
    for index, egress in enumerate(found.spec.egress or ()):
        try:
            rules += _rules(egress, f"egress[{index}]", refused)
        except FieldError as error:
            raise document.error(error.under("spec", "egress", index)) from None
    return ClusterPolicy(found, (*_LOOPBACK, *rules), tuple(refused), document.place)


def local_pods(pods: Iterable[ClusterPod], node_name: str) -> list[ClusterPod]:
    """Return the Pods of this node; where its name is not known, all of them."""
    return [pod for pod in pods if not node_name or pod.node in ("", node_name)]


def join_policy(policy: ClusterPolicy, pods: Iterable[ClusterPod]) -> Policy:
    """Return *policy* for those of the *pods* of this node that it selects."""
    spec, refused = policy.found.spec, list(policy.refused)
    selected = [
        pod
        for pod in pods
        if pod.namespace == policy.found.namespace
        and (spec.pod_selector is None or spec.pod_selector.matches(pod.labels))
    ]
    refused += [f"the cgroup of Pod {pod.name} is not known" for pod in selected if not pod.cgroup]
    if not selected:
        refused.append("podSelector: it selects no Pod that is known on this node")
    cgroups = tuple(sorted({pod.cgroup for pod in selected if pod.cgroup}))
    return Policy(
        policy.found.name,
        PolicyAction.ALLOW,
        policy.rules,
        Clients("all", cgroups),
        tuple(refused),
    )


def _rules(egress: EgressRule, where: str, refused: list[str]) -> Iterator[Rule]:
    """Return what an egress rule allows; what cannot be enforced goes to *refused*."""
    ports = tuple(_ports(egress.ports or (), where, refused))
    if egress.ports and not ports:
        return
    if not egress.to:
        yield from (Rule(network, (), ports) for network in EVERYWHERE)
    for index, peer in enumerate(egress.to or ()):
        if peer.ip_block is None:
            kind = "podSelector" if peer.pod_selector else "namespaceSelector"
            refused.append(f"{where}.to[{index}].{kind}: sockhop knows addresses (ipBlock) only")
            continue
        try:
            yield Rule(*read_block(peer.ip_block.cidr, peer.ip_block.excluded or ()), ports)
        except FieldError as error:
            raise error.under("to", index, "ipBlock") from None


def _ports(ports: Iterable[PolicyPort], where: str, refused: list[str]) -> Iterator[Ports]:
    for index, port in enumerate(ports):
        at = f"{where}.ports[{index}]"
        path: FieldPath = ("ports", index, "endPort")
        if port.protocol == "SCTP":
            refused.append(f"{at}: SCTP meets no hook")
        elif isinstance(port.port, str):
            refused.append(f"{at}: the port name {shown(port.port)} says nothing of an address")
        elif port.port is None:
            if port.end_port is not None:
                raise FieldError(shown(port.end_port), "no endPort without a port", path=path)
            yield Ports(Protocol(port.protocol or "TCP"))
        else:
            last = port.end_port or port.port
            if last < port.port:
                raise FieldError(shown(last), f"no less than port, {port.port}", path=path)
            yield Ports(Protocol(port.protocol or "TCP"), port.port, last)
