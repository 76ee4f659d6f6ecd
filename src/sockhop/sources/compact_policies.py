"""Policies in the compact form."""

from collections.abc import Iterator
from typing import Annotated, Literal, NamedTuple

from msgspec import UNSET, Meta, Struct, UnsetType, field

from sockhop.model import Policy, PolicyAction, Ports, Protocol, Rule
from sockhop.sources.compact_fields import ClientsForm, Name, clients_of
from sockhop.sources.documents import Document, Place
from sockhop.sources.fields import FieldError, FieldPath, shown
from sockhop.sources.networks import read_block

__all__ = ["PolicyClaim", "PolicyForm", "read_policies"]

_PORTS = 'a port from 1 to 65535 or a range such as "8000-8999"'
_PROTOCOLS = {"tcp": Protocol.TCP, "udp": Protocol.UDP, "tcp+udp": None}

PortForm = Annotated[
    Annotated[int, Meta(ge=1, le=65535)]
    | Annotated[str, Meta(pattern=r"^[0-9]{1,5}-[0-9]{1,5}\Z")],
    Meta(description=_PORTS),
]


class RuleForm(Struct, frozen=True, forbid_unknown_fields=True):
    """Destinations that a policy denies or allows."""

    cidr: str
    excluded: list[str] = field(name="except", default_factory=list)
    ports: (
        Annotated[
            list[PortForm], Meta(min_length=1, description=f"a list of one or more of {_PORTS}")
        ]
        | UnsetType
    ) = UNSET
    protocol: Literal["tcp", "udp", "tcp+udp"] = "tcp+udp"


class PolicyForm(Struct, frozen=True, forbid_unknown_fields=True):
    """A policy as written: it has `deny` or `allow`."""

    name: Name
    clients: ClientsForm | UnsetType = UNSET
    deny: list[RuleForm] | UnsetType = UNSET
    allow: list[RuleForm] | UnsetType = UNSET


class PolicyClaim(NamedTuple):
    """A policy, and where it stands."""

    policy: Policy
    place: Place
    path: FieldPath


def read_policies(document: Document, forms: list[PolicyForm]) -> Iterator[PolicyClaim]:
    """Return the policies *forms* of a compact document. Raises InputError."""
    for index, form in enumerate(forms):
        path = ("policies", index)
        try:
            yield PolicyClaim(_policy(form), document.place, path)
        except FieldError as error:
            raise document.error(error.under(*path)) from None


def _policy(form: PolicyForm) -> Policy:
    if (form.deny is UNSET) == (form.allow is UNSET):
        raise FieldError(
            "neither deny nor allow" if form.deny is UNSET else "both deny and allow",
            "one of deny and allow",
        )
    action = PolicyAction.ALLOW if form.deny is UNSET else PolicyAction.DENY
    rules = []
    for index, rule in enumerate(getattr(form, action)):
        try:
            rules.append(_rule(rule))
        except FieldError as error:
            raise error.under(str(action), index) from None
    return Policy(form.name, action, tuple(rules), clients_of(form.clients))


def _rule(form: RuleForm) -> Rule:
    cidr, excluded = read_block(form.cidr, form.excluded)
    protocol = _PROTOCOLS[form.protocol]
    if form.ports is not UNSET:
        ports = tuple(_ports(text, protocol, at) for at, text in enumerate(form.ports))
    else:
        ports = (Ports(protocol),) if protocol else ()
    return Rule(cidr, excluded, ports)


def _ports(text: int | str, protocol: Protocol | None, index: int) -> Ports:
    first, _, last = str(text).partition("-")
    ports = Ports(protocol, int(first), int(last or first))
    if not 1 <= ports.first <= ports.last <= 65535:
        raise FieldError(shown(text), _PORTS, path=("ports", index))
    return ports
