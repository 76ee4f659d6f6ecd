"""What one file says: all that is kept of it."""

from collections import Counter
from typing import NamedTuple

import msgspec
from msgspec import UNSET, UnsetType

from sockhop.sources.compact import CompactClaim, read_compact, read_services
from sockhop.sources.compact_policies import PolicyClaim, read_policies
from sockhop.sources.documents import Document, read_documents
from sockhop.sources.fields import FieldError, shown
from sockhop.sources.kubernetes_policy import (
    ClusterPod,
    ClusterPolicy,
    ClusterRedirect,
    read_network_policy,
    read_pod,
    read_redirect,
)
from sockhop.sources.kubernetes_read import (
    ClusterService,
    ClusterSlice,
    read_service,
    read_slice,
)
from sockhop.sources.paths import printable

__all__ = ["Part", "read_part"]


class Part(NamedTuple):
    """The services and policies of a file in the compact form, and its Kubernetes objects.

    All in its order.

    `warnings`: what of the former has no effect; `unknown`: which objects sockhop does not read.
    """

    claims: tuple[CompactClaim, ...]
    services: tuple[ClusterService, ...]
    slices: tuple[ClusterSlice, ...]
    warnings: tuple[str, ...]
    unknown: tuple[str, ...]
    policies: tuple[PolicyClaim, ...] = ()
    network_policies: tuple[ClusterPolicy, ...] = ()
    redirects: tuple[ClusterRedirect, ...] = ()
    pods: tuple[ClusterPod, ...] = ()


class _Head(msgspec.Struct, rename="camel"):
    """What tells Kubernetes objects from the compact form, which has neither."""

    api_version: str | UnsetType = UNSET
    kind: str | UnsetType = UNSET


def read_part(path: str, before: Part | None) -> Part:
    """Read a file. Raises InputError; nothing is ever read in part.

    A service that is as it was *before* is the same object as before.
    """
    reader = _Reader()
    for document in read_documents(path):
        reader.take(document)
    known = {claim.service.name: claim.service for claim in before.claims} if before else {}
    claims = (
        claim._replace(service=known[claim.service.name])
        if known.get(claim.service.name) == claim.service
        else claim
        for claim in reader.claims
    )
    return Part(
        tuple(claims),
        tuple(reader.services),
        tuple(reader.slices),
        tuple(reader.warnings),
        tuple(_unknown(path, kind, count) for kind, count in reader.unknown.items()),
        tuple(reader.policies),
        tuple(reader.network_policies),
        tuple(reader.redirects),
        tuple(reader.pods),
    )


class _Reader:
    """Gives each document to where it belongs."""

    def __init__(self) -> None:
        self.claims: list[CompactClaim] = []
        self.services: list[ClusterService] = []
        self.slices: list[ClusterSlice] = []
        self.warnings: list[str] = []
        self.unknown: Counter[str] = Counter()
        self.policies: list[PolicyClaim] = []
        self.network_policies: list[ClusterPolicy] = []
        self.redirects: list[ClusterRedirect] = []
        self.pods: list[ClusterPod] = []

    def take(self, document: Document) -> None:
        head = document.decode(_Head)
        if head.api_version is UNSET and head.kind is UNSET:
            form = read_compact(document)
            self.claims += read_services(document, form.services or (), self.warnings)
            self.policies += read_policies(document, form.policies or [])
        elif (head.api_version, head.kind) == ("v1", "List"):
            for item in document.items():
                self._take_object(item, item.decode(_Head))
        else:
            self._take_object(document, head)

    def _take_object(self, document: Document, head: _Head) -> None:
        for key, value in (("apiVersion", head.api_version), ("kind", head.kind)):
            if value is UNSET:
                raise document.error(FieldError("nothing", f"the object's {key}", path=(key,)))
        match head.api_version, head.kind:
            case "v1", "Service":
                self.services.append(read_service(document))
            case "discovery.k8s.io/v1", "EndpointSlice":
                self.slices.append(read_slice(document))
            case "networking.k8s.io/v1", "NetworkPolicy":
                self.network_policies.append(read_network_policy(document))
            case "sockhop.io/v1alpha1", "LocalRedirectPolicy":
                self.redirects.append(read_redirect(document))
            case "v1", "Pod":
                if pod := read_pod(document):
                    self.pods.append(pod)
            case _:
                self.unknown[f"{shown(head.kind)} ({shown(head.api_version)})"] += 1


def _unknown(path: str, kind: str, count: int) -> str:
    objects = "1 object" if count == 1 else f"{count} objects"
    verb = "is" if count == 1 else "are"
    return (
        f"{printable(path)}: {objects} of kind {kind} {verb} ignored: "
        "sockhop reads v1 Service and Pod, discovery.k8s.io/v1 EndpointSlice, "
        "networking.k8s.io/v1 NetworkPolicy and sockhop.io/v1alpha1 LocalRedirectPolicy"
    )
