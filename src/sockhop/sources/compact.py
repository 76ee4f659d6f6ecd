"""The compact form of services: its types, and the services that it describes.

`compact.schema.json` says the same as JSON Schema; its `$comment` lists what a schema cannot
say.
"""

from collections.abc import Iterable, Iterator
from typing import Annotated, Literal, NamedTuple

from msgspec import UNSET, Meta, Struct, UnsetType, field

from sockhop.model import (
    BACKENDS_MAX,
    WEIGHT_MAX,
    Algorithm,
    Backend,
    BackendState,
    Frontend,
    Protocol,
    Service,
    endpoint,
)
from sockhop.sources.compact_fields import ClientsForm, Name, clients_of
from sockhop.sources.compact_policies import PolicyForm
from sockhop.sources.documents import Document, Place
from sockhop.sources.fields import (
    Duration,
    FieldError,
    FieldPath,
    milliseconds,
    parse_host,
    shown,
)
from sockhop.sources.health import HealthForm, read_health
from sockhop.sources.intents import IntentForm, read_intents
from sockhop.sources.splices import SpliceForm, read_splice

__all__ = [
    "AFFINITY_DEFAULT",
    "AFFINITY_MAX",
    "CompactClaim",
    "CompactFile",
    "FrontendKeys",
    "read_compact",
    "read_services",
]

FrontendKeys = frozenset[tuple[str, int, Protocol]]
"""What clients dial of a service (:attr:`Frontend.key`)."""

AFFINITY_MAX = 86400
"""Longest affinity in seconds, as in Kubernetes (core/v1 ClientIPConfig.timeoutSeconds)."""

AFFINITY_DEFAULT = 10800
"""Affinity in seconds where no time is given, as in Kubernetes."""

FALLBACK_DEFAULT = (BackendState.TERMINATING,)
"""What serves where no backend is active, as in Kubernetes (KEP-1669)."""

_PROTOCOLS = {
    "tcp": (Protocol.TCP,),
    "udp": (Protocol.UDP,),
    "tcp+udp": (Protocol.TCP, Protocol.UDP),
}
_ENDPOINT = '"address:port" with a port from 1 to 65535'
_FRONTEND = f"{_ENDPOINT}, then nothing or one of /tcp, /udp, /tcp+udp"

Weight = Annotated[
    int, Meta(ge=0, le=WEIGHT_MAX, description=f"a whole number from 0 to {WEIGHT_MAX}")
]


class BackendForm(Struct, frozen=True, forbid_unknown_fields=True, gc=False):
    """A backend with more than its address."""

    address: str
    weight: Weight = 1
    state: BackendState = BackendState.ACTIVE


class ClientAffinity(Struct, frozen=True, forbid_unknown_fields=True, gc=False):
    """How long a client address stays with its backend."""

    timeout: Duration | UnsetType = UNSET


class SessionAffinity(Struct, frozen=True, forbid_unknown_fields=True):
    """By what clients are told apart: their address."""

    client_ip: ClientAffinity = field(name="clientIP")


class ServiceForm(Struct, frozen=True, forbid_unknown_fields=True):
    """A service as written."""

    name: Name
    frontends: Annotated[
        list[str], Meta(min_length=1, description=f"a list of one or more of {_FRONTEND}")
    ]
    backends: Annotated[
        list[
            Annotated[
                str | BackendForm,
                Meta(description='"address:port" or {address, weight, state}'),
            ]
        ],
        Meta(max_length=BACKENDS_MAX, description=f"a list of up to {BACKENDS_MAX} backends"),
    ]
    algorithm: Algorithm = Algorithm.RANDOM
    session_affinity: SessionAffinity | UnsetType = field(name="sessionAffinity", default=UNSET)
    fallback: (
        Annotated[
            list[Literal["terminating", "quarantined", "maintenance"]],
            Meta(description="a list of terminating, quarantined, maintenance"),
        ]
        | UnsetType
    ) = UNSET
    reserve: bool = False
    intent: IntentForm | UnsetType = UNSET
    splice: SpliceForm | UnsetType = UNSET
    health: HealthForm | UnsetType = UNSET
    clients: ClientsForm | UnsetType = UNSET


class CompactFile(Struct, frozen=True, forbid_unknown_fields=True):
    """A whole document."""

    version: Literal[1]
    services: list[ServiceForm] | UnsetType = UNSET
    policies: list[PolicyForm] | UnsetType = UNSET


class CompactClaim(NamedTuple):
    """A service, the keys of its frontends, and where they stand.

    `position` is the service's in its document; `positions` are those of the texts that its
    frontends come from.
    """

    service: Service
    keys: FrontendKeys
    place: Place
    position: int
    positions: tuple[int, ...]

    @property
    def path(self) -> FieldPath:
        """Where the service stands in its document."""
        return "services", self.position

    def frontend_path(self, number: int) -> FieldPath:
        """Where the text of a frontend stands in the document."""
        return (*self.path, "frontends", self.positions[number])


def read_compact(document: Document) -> CompactFile:
    """Read a compact document. Raises InputError, also where it asks for nothing at all."""
    found = document.decode(CompactFile)
    if found.services is UNSET and found.policies is UNSET:
        raise document.error(FieldError("nothing", "a list", path=("services",)))
    return found


def read_services(
    document: Document, forms: Iterable[ServiceForm], warnings: list[str]
) -> Iterator[CompactClaim]:
    """Return the services *forms* of a compact document; what is ignored goes to *warnings*.

    Raises InputError.
    """
    for index, form in enumerate(forms):
        path = ("services", index)
        try:
            frontends, indexes = _frontends(form)
            splice, limits = read_splice(form.splice)
            service = Service(
                form.name,
                frontends,
                form.algorithm,
                _affinity(form),
                _fallback(form),
                form.reserve,
                clients_of(form.clients),
                () if form.intent is UNSET else read_intents(form.intent),
                splice,
                limits,
                None if form.health is UNSET else read_health(form.health),
            )
        except FieldError as error:
            raise document.error(error.under(*path)) from None
        for text in _ignored(form, frontends):
            warnings.append(f"{document.place.file}: service {form.name}: {text}")
        keys = frozenset(frontend.key for frontend in frontends)
        yield CompactClaim(service, keys, document.place, index, indexes)


def _frontends(form: ServiceForm) -> tuple[tuple[Frontend, ...], tuple[int, ...]]:
    """Return the frontends, and of each the index of the text that it comes from."""
    backends = _backends(form.backends)
    ipv4 = tuple(backend for backend in backends if ":" not in backend.address)
    # No IPv6 backend: the IPv4 ones serve as mapped addresses.
    ipv6 = tuple(backend for backend in backends if ":" in backend.address) or ipv4
    frontends, indexes = [], []
    for index, text in enumerate(form.frontends):
        listen, slash, names = text.partition("/")
        protocols = _PROTOCOLS.get(names) if slash else (Protocol.TCP,)
        try:
            if protocols is None:
                raise FieldError(shown(text), _FRONTEND)
            address, port = _endpoint(listen, text, _FRONTEND)
        except FieldError as error:
            raise error.under("frontends", index) from None
        fitting = ipv6 if ":" in address else ipv4
        for protocol in protocols:
            frontends.append(Frontend(address, port, protocol, backends=fitting))
            indexes.append(index)
    return tuple(frontends), tuple(indexes)


def _backends(forms: list[str | BackendForm]) -> list[Backend]:
    backends = []
    for index, form in enumerate(forms):
        try:
            if isinstance(form, str):
                address, port = _endpoint(form, form, _ENDPOINT)
                backends.append(Backend(address, port))
            else:
                address, port = _endpoint(form.address, form.address, _ENDPOINT, "address")
                backends.append(Backend(address, port, form.state, form.weight))
        except FieldError as error:
            raise error.under("backends", index) from None
    if len({(backend.address, backend.port) for backend in backends}) < len(backends):
        raise _twice(backends)
    return backends


def _endpoint(text: str, whole: str, expected: str, *step: str) -> tuple[str, int]:
    """Parse `address:port`, IPv6 in brackets. *whole*, *expected*, *step* are for the error."""
    host, _, digits = text.rpartition(":")
    port = int(digits) if digits.isdigit() and digits.isascii() and len(digits) <= 5 else 0
    bracketed = host[:1] == "["
    if bracketed and host[-1] == "]":
        host = host[1:-1]
    address = parse_host(host) if bracketed == (":" in host) else ""
    if not address or not 1 <= port <= 65535 or digits[0] == "0":
        unbracketed = text.count(":") > 1 and not bracketed
        hint = 'an IPv6 address stands in brackets: "[fd00::10]:53"' if unbracketed else ""
        raise FieldError(shown(whole), expected, path=step, hint=hint)
    return address, port


def _twice(backends: list[Backend]) -> FieldError:
    seen: dict[tuple[str, int], int] = {}
    for index, backend in enumerate(backends):
        first = seen.setdefault((backend.address, backend.port), index)
        if first != index:
            found = f"{endpoint(backend.address, backend.port)} again (as in backends[{first}])"
            return FieldError(found, "each backend once", path=("backends", index))
    raise AssertionError("no backend is there twice")


def _affinity(form: ServiceForm) -> int:
    """Return the affinity in seconds."""
    if form.session_affinity is UNSET:
        return 0
    timeout = form.session_affinity.client_ip.timeout
    if timeout is UNSET:
        return AFFINITY_DEFAULT
    found = milliseconds(timeout)
    if found % 1000 or not 1000 <= found <= AFFINITY_MAX * 1000:
        raise FieldError(
            shown(timeout),
            "whole seconds, from 1s to 1d",
            path=("sessionAffinity", "clientIP", "timeout"),
        )
    return found // 1000


def _fallback(form: ServiceForm) -> tuple[BackendState, ...]:
    """Return the states that serve, in this order, where no backend is active."""
    if form.fallback is UNSET:
        return FALLBACK_DEFAULT
    states = form.fallback
    for index, state in enumerate(states):
        first = states.index(state)
        if first != index:
            found = f"{state} again (as in fallback[{first}])"
            raise FieldError(found, "each state once", path=("fallback", index))
    return tuple(BackendState(state) for state in states)


def _ignored(form: ServiceForm, frontends: tuple[Frontend, ...]) -> Iterator[str]:
    """Say what of a service has no effect."""
    for frontend in frontends:
        if form.backends and not frontend.backends:
            yield f"frontend {frontend} has no backend: IPv6 ones cannot serve an IPv4 frontend"
