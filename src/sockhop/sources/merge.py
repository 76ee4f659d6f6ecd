"""What all files say together: every name and every frontend in one service only."""

from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime
from itertools import chain
from typing import NamedTuple, TypeAlias

from msgspec import structs

from sockhop.errors import InputError
from sockhop.model import Frontend, Protocol, Service
from sockhop.sources.compact import CompactClaim
from sockhop.sources.documents import Place
from sockhop.sources.fields import FieldError, FieldPath, shown
from sockhop.sources.kubernetes_join import ClusterClaim, Joiner
from sockhop.sources.parts import Part

__all__ = ["Merger"]

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

    def merge(self, parts: Sequence[Part]) -> tuple[tuple[Service, ...], tuple[str, ...]]:
        """Return all services by name, and the warnings. Raises InputError."""
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
        return tuple(services[name] for name in sorted(services)), tuple(warnings)


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
