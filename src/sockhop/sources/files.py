"""Desired state from manifest files: the compact form and Kubernetes objects, together."""

import gc
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple, TypeAlias

import msgspec
from msgspec import UNSET, UnsetType

from sockhop.errors import InputError
from sockhop.model import Desired, Frontend, Protocol, Service
from sockhop.sources.compact import CompactClaim, read_compact
from sockhop.sources.documents import Document, read_documents
from sockhop.sources.fields import FieldError, FieldPath, shown
from sockhop.sources.kubernetes_join import Cluster, ClusterClaim

__all__ = ["Loaded", "load"]

_LATEST = datetime.max.replace(tzinfo=UTC)


class Loaded(msgspec.Struct, frozen=True):
    """What files say, and, a line each, `FILE: …: what is ignored and why`."""

    desired: Desired
    warnings: tuple[str, ...]


class _Head(msgspec.Struct, rename="camel"):
    """What tells Kubernetes objects from the compact form, which has neither."""

    api_version: str | UnsetType = UNSET
    kind: str | UnsetType = UNSET


def load(paths: Sequence[Path], *, node_name: str = "") -> Loaded:
    """Read manifests from files and directories.

    *node_name*: the Kubernetes node whose endpoints `internalTrafficPolicy: Local` keeps;
    without it they all stay, with a warning.

    Services are sorted by name; frontends and backends stay in the order of the manifest.
    Frontends are unique: of two Kubernetes Services the older keeps one that both have.
    Raises InputError, which names file, line, document and field, for anything that cannot be
    read or believed; nothing is ever read in part.
    """
    if not paths:
        raise InputError("no file or directory of manifests is given")
    with _collector_paused():
        return _load(paths, node_name)


@contextmanager
def _collector_paused() -> Iterator[None]:
    """Without the garbage collector, which takes half of the time and finds no cycle here."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _load(paths: Sequence[Path], node_name: str) -> Loaded:
    warnings: list[str] = []
    compact: list[CompactClaim] = []
    cluster = Cluster(node_name, warnings)
    unknown: dict[tuple[str, str], int] = {}
    for document in read_documents(paths):
        compact += _sort(document, cluster, unknown, warnings)
    for (file, kind), count in unknown.items():
        objects = "1 object" if count == 1 else f"{count} objects"
        verb = "is" if count == 1 else "are"
        warnings.append(
            f"{file}: {objects} of kind {kind} {verb} ignored: "
            "sockhop reads v1 Service and discovery.k8s.io/v1 EndpointSlice"
        )
    services = _merge(compact, cluster.services(), warnings)
    return Loaded(Desired(tuple(services)), tuple(warnings))


def _sort(
    document: Document,
    cluster: Cluster,
    unknown: dict[tuple[str, str], int],
    warnings: list[str],
) -> Iterable[CompactClaim]:
    """Return the services of a compact document; give anything else to where it belongs."""
    head = document.decode(_Head)
    if head.api_version is UNSET and head.kind is UNSET:
        return read_compact(document, warnings)
    if (head.api_version, head.kind) == ("v1", "List"):
        for item in document.items():
            _add_object(item, item.decode(_Head), cluster, unknown)
    else:
        _add_object(document, head, cluster, unknown)
    return ()


def _add_object(
    document: Document, head: _Head, cluster: Cluster, unknown: dict[tuple[str, str], int]
) -> None:
    for key, value in (("apiVersion", head.api_version), ("kind", head.kind)):
        if value is UNSET:
            raise document.error(FieldError("nothing", f"the object's {key}", path=(key,)))
    if (head.api_version, head.kind) == ("v1", "Service"):
        cluster.add_service(document)
    elif (head.api_version, head.kind) == ("discovery.k8s.io/v1", "EndpointSlice"):
        cluster.add_slice(document)
    else:
        what = (document.file, f"{shown(head.kind)} ({shown(head.api_version)})")
        unknown[what] = unknown.get(what, 0) + 1


class _Owner(NamedTuple):
    """Where a frontend stands, and whose it is."""

    service: str
    document: Document
    path: FieldPath
    is_compact: bool


_Owners: TypeAlias = dict[tuple[str, int, Protocol], _Owner]


def _merge(
    compact: list[CompactClaim], cluster: Iterable[ClusterClaim], warnings: list[str]
) -> list[Service]:
    """Return all services by name, with each frontend in one of them. Raises InputError."""
    services: dict[str, Service] = {}
    owners: _Owners = {}
    names: dict[str, CompactClaim] = {}
    for claim in compact:
        first = names.setdefault(claim.service.name, claim)
        if first is not claim:
            raise _name_twice(claim, first.document.place((*first.path, "name")))
        _claim_compact(claim, owners)
        services[claim.service.name] = claim.service
    for cluster_claim in sorted(cluster, key=_age):
        name = cluster_claim.service.name
        if name in names:
            raise _name_twice(names[name], cluster_claim.document.place(("metadata", "name")))
        if frontends := tuple(_claim_cluster(cluster_claim, owners, warnings)):
            services[name] = msgspec.structs.replace(cluster_claim.service, frontends=frontends)
    return [services[name] for name in sorted(services)]


def _claim_compact(claim: CompactClaim, owners: _Owners) -> None:
    service, document, _, paths = claim
    for frontend, path in zip(service.frontends, paths, strict=True):
        owner = _Owner(service.name, document, path, is_compact=True)
        first = owners.setdefault(frontend.key, owner)
        if first is not owner:
            raise _frontend_twice(frontend, owner, first)


def _claim_cluster(claim: ClusterClaim, owners: _Owners, warnings: list[str]) -> Iterator[Frontend]:
    """Return the frontends that no older Service has."""
    service, document, _ = claim
    for frontend in service.frontends:
        owner = _Owner(service.name, document, (), is_compact=False)
        first = owners.setdefault(frontend.key, owner)
        if first is owner:
            yield frontend
        elif first.is_compact:
            raise _frontend_twice(frontend, first, owner)
        else:
            same = first.service == service.name
            reason = "it is there twice" if same else f"the older Service {first.service} has it"
            warnings.append(
                f"{document.file}: Service {service.name}: "
                f"frontend {frontend} ({frontend.type}) is ignored: {reason}"
            )


def _age(claim: ClusterClaim) -> tuple[datetime, str]:
    return claim.created or _LATEST, claim.service.name


def _name_twice(claim: CompactClaim, elsewhere: str) -> InputError:
    name = shown(claim.service.name)
    error = FieldError(f"{name}, which is at {elsewhere} too", "a name of its own")
    return claim.document.error(error.under(*claim.path, "name"))


def _frontend_twice(frontend: Frontend, owner: _Owner, first: _Owner) -> InputError:
    where = first.document.place(first.path)
    found = f"{frontend}, which {first.service} has too ({where})"
    error = FieldError(found, "a frontend of its own", path=owner.path)
    return owner.document.error(error)
