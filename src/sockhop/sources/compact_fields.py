"""Types that several parts of the compact form share."""

from typing import Annotated, Literal

from msgspec import UNSET, Meta, Struct, UnsetType

from sockhop.model import NAME_MAX, Clients

__all__ = ["AbsolutePath", "ClientsForm", "Name", "clients_of"]

Name = Annotated[
    str,
    Meta(
        pattern=r"^[A-Za-z0-9]([A-Za-z0-9._/-]*[A-Za-z0-9])?\Z",
        max_length=NAME_MAX,
        description=f"a name of 1 to {NAME_MAX} letters, digits and . _ / -, "
        "with a letter or digit at each end",
    ),
]
AbsolutePath = Annotated[
    str, Meta(pattern=r"^/[^\x00-\x1f\x7f]*\Z", description='a path that begins with "/"')
]


class ClientsForm(Struct, frozen=True, forbid_unknown_fields=True):
    """Whose connections are meant: network namespaces and cgroups by path."""

    namespaces: (
        Annotated[
            Literal["host", "all"] | Annotated[list[AbsolutePath], Meta(min_length=1)],
            Meta(description="host, all or a list of one or more paths"),
        ]
        | UnsetType
    ) = UNSET
    cgroups: list[AbsolutePath] = []
    exclude: list[AbsolutePath] = []


def clients_of(form: ClientsForm | UnsetType) -> Clients | None:
    """Return whom *form* means; None where it is not there."""
    if form is UNSET:
        return None
    found = form.namespaces
    namespaces = tuple(found) if isinstance(found, list) else None if found is UNSET else found
    return Clients(namespaces, tuple(form.cgroups), tuple(form.exclude))
