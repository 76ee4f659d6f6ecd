"""What all files say together: every name and every frontend in one service only."""

from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime
from itertools import chain
from typing import NamedTuple, TypeAlias, TypeVar

from msgspec import structs

from sockhop.errors import InputError
from sockhop.model import Desired, Frontend, Policy, Protocol, Service
from sockhop.sources.compact import CompactClaim
from sockhop.sources.documents import Place
from sockhop.sources.fields import FieldError, FieldPath, shown
from sockhop.sources.kubernetes_join import ClusterClaim, Joiner
from sockhop.sources.kubernetes_policy import (
    ClusterPod,
    ClusterPolicy,
    ClusterRedirect,
    join_policy,
    local_pods,
)
from sockhop.sources.parts import Part
from sockhop.sources.redirects import join_redirects

__all__ = ["Merger"]

_T = TypeVar("_T", ClusterPolicy, ClusterRedirect)
_LATEST = datetime.max.replace(tzinfo=UTC)


class _Owner(NamedTuple):
    """Where a frontend stands, and whose it is."""

    service: str
    place: Place
    path: FieldPath
    is_compact: bool


_Owners: TypeAlias = dict[tuple[str, int, Protocol], _Owner]


class Merger:
    """Merges the parts of all files, again and again.

    Each time from all parts, and hence always the same; fast because it looks at frontends one
    by one only where two services have the same, and joins only what differs from last time.
    """

    def __init__(self, node_name: str) -> None:
        """*node_name*: the Kubernetes node whose endpoints are local, "" if that is not known."""
        self._joiner = Joiner(node_name)
        self._node_name = node_name

    def merge(self, parts: Sequence[Part]) -> tuple[Desired, tuple[str, ...]]:
        """Return what is asked for, each kind by name, and the warnings. Raises InputError."""
        compact: dict[str, CompactClaim] = {}
        for claim in chain.from_iterable(part.claims for part in parts):
            first = compact.setdefault(claim.service.name, claim)
            if first is not claim:
                raise _name_twice(claim, first.place.title((*first.path, "name")))
        warnings = [*chain.from_iterable(part.warnings for part in parts)]
        warnings += chain.from_iterable(part.unknown for part in parts)
        cluster = self._joiner.join(
            chain.from_iterable(part.services for part in parts),
            chain.from_iterable(part.slices for part in parts),
            warnings,
        )
        warnings += chain.from_iterable(claim.warnings for claim in cluster)
        services = {name: claim.service for name, claim in compact.items()}
        for found in cluster:
            if found.service:
                name = found.service.name
                if name in compact:
                    elsewhere = found.found.place.title(("metadata", "name"))
                    raise _name_twice(compact[name], elsewhere)
                services[name] = found.service
        if contested := _contested(chain(compact.values(), cluster)):
            _settle(contested, compact.values(), cluster, services, warnings)
        pods = local_pods(chain.from_iterable(part.pods for part in parts), self._node_name)
        redirects = chain.from_iterable(part.redirects for part in parts)
        desired = Desired(
            tuple(services[name] for name in sorted(services)),
            tuple(_policies(parts, pods)),
            tuple(join_redirects(_once(redirects, "LocalRedirectPolicy"), services, pods)),
        )
        return desired, (*warnings, *_refusals(desired))


def _policies(parts: Sequence[Part], pods: list[ClusterPod]) -> list[Policy]:
    """Return all policies by name. Raises InputError for a name that is there twice."""
    found: dict[str, tuple[Policy, Place]] = {}
    for claim in chain.from_iterable(part.policies for part in parts):
        first = found.setdefault(claim.policy.name, (claim.policy, claim.place))
        if first[0] is not claim.policy:
            name = f"{shown(claim.policy.name)}, which is in {first[1].file} too"
            error = FieldError(name, "a name of its own")
            raise claim.place.error(error.under(*claim.path, "name"))
    policies = chain.from_iterable(part.network_policies for part in parts)
    for policy in _once(policies, "NetworkPolicy"):
        if policy.found.name in found:
            name = f"NetworkPolicy {policy.found.name}, whose name another policy has"
            error = FieldError(name, "a name of its own", path=("metadata", "name"))
            raise policy.place.error(error)
        found[policy.found.name] = join_policy(policy, pods), policy.place
    return [found[name][0] for name in sorted(found)]


def _once(objects: Iterable[_T], kind: str) -> list[_T]:
    """Return *objects*. Raises InputError for a name that is there twice."""
    places: dict[str, _T] = {}
    for each in objects:
        name = each.found.name
        first = places.setdefault(name, each)
        if first is not each:
            title = f"{kind} {name}, which is at {first.place.title()} too"
            raise each.place.error(FieldError(title, "each object once", path=("metadata", "name")))
    return list(places.values())


def _refusals(desired: Desired) -> Iterator[str]:
    for policy in desired.policies:
        for reason in policy.refused:
            yield f"policy {policy.name} is refused: {reason}"
    for redirect in desired.redirects:
        for reason in redirect.refused:
            yield f"redirect {redirect.name} is refused: {reason}"


def _contested(claims: Iterable[CompactClaim | ClusterClaim]) -> set[tuple[str, int, Protocol]]:
    """Return the keys of the frontends that are there twice, and perhaps some more."""
    owned: set[tuple[str, int, Protocol]] = set()
    contested: set[tuple[str, int, Protocol]] = set()
    for claim in claims:
        keys = claim.keys
        if not owned.isdisjoint(keys):
            contested |= owned & keys
        if claim.service and len(keys) < len(claim.service.frontends):
            contested |= keys
        owned |= keys
    return contested


def _settle(
    contested: set[tuple[str, int, Protocol]],
    compact: Iterable[CompactClaim],
    cluster: Iterable[ClusterClaim],
    services: dict[str, Service],
    warnings: list[str],
) -> None:
    """Give each contested frontend to one of *services*. Raises InputError."""
    owners: _Owners = {}
    for claim in compact:
        if not contested.isdisjoint(claim.keys):
            _claim_compact(claim, owners)
    rivals = [claim for claim in cluster if not contested.isdisjoint(claim.keys)]
    for rival in sorted(rivals, key=_age):
        name = rival.found.name
        if frontends := tuple(_claim_cluster(rival, services[name], owners, warnings)):
            services[name] = structs.replace(services[name], frontends=frontends)
        else:
            del services[name]


def _claim_compact(claim: CompactClaim, owners: _Owners) -> None:
    for number, frontend in enumerate(claim.service.frontends):
        path = claim.frontend_path(number)
        owner = _Owner(claim.service.name, claim.place, path, is_compact=True)
        first = owners.setdefault(frontend.key, owner)
        if first is not owner:
            raise _frontend_twice(frontend, owner, first)


def _claim_cluster(
    claim: ClusterClaim, service: Service, owners: _Owners, warnings: list[str]
) -> Iterator[Frontend]:
    """Return the frontends that no older Service has."""
    place = claim.found.place
    for frontend in service.frontends:
        owner = _Owner(service.name, place, (), is_compact=False)
        first = owners.setdefault(frontend.key, owner)
        if first is owner:
            yield frontend
        elif first.is_compact:
            raise _frontend_twice(frontend, first, owner)
        else:
            same = first.service == service.name
            reason = "it is there twice" if same else f"the older Service {first.service} has it"
            warnings.append(
                f"{place.file}: Service {service.name}: "
                f"frontend {frontend} ({frontend.type}) is ignored: {reason}"
            )


def _age(claim: ClusterClaim) -> tuple[datetime, str]:
    return claim.found.created or _LATEST, claim.found.name


def _name_twice(claim: CompactClaim, elsewhere: str) -> InputError:
    name = shown(claim.service.name)
    error = FieldError(f"{name}, which is at {elsewhere} too", "a name of its own")
    return claim.place.error(error.under(*claim.path, "name"))


def _frontend_twice(frontend: Frontend, owner: _Owner, first: _Owner) -> InputError:
    where = first.place.title(first.path)
    found = f"{frontend}, which {first.service} has too ({where})"
    error = FieldError(found, "a frontend of its own", path=owner.path)
    return owner.place.error(error)
