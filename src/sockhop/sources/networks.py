"""Networks as policies name them."""

import ipaddress
from collections.abc import Sequence

from sockhop.model import parse_network
from sockhop.sources.fields import FieldError, shown

__all__ = ["EVERYWHERE", "read_block"]

EVERYWHERE = ("0.0.0.0/0", "::/0")
"""All addresses of both families."""

_NETWORK = "an IPv4 or IPv6 network such as 10.0.0.0/8"


def read_block(cidr: str, excluded: Sequence[str]) -> tuple[str, tuple[str, ...]]:
    """Return a network and those to leave out of it, as canonical text.

    Raises FieldError with a path that begins with `cidr` or `except`, as in an ipBlock of
    networking.k8s.io/v1: what is left out lies in the network.
    """
    network = _network(cidr, "cidr")
    inner = []
    whole = ipaddress.ip_network(network)
    for index, text in enumerate(excluded):
        found = _network(text, "except", index)
        part = ipaddress.ip_network(found)
        if part.version != whole.version or not part.subnet_of(whole):  # type: ignore[arg-type]
            raise FieldError(shown(text), f"a network in {network}", path=("except", index))
        inner.append(found)
    return network, tuple(inner)


def _network(text: str, *path: str | int) -> str:
    try:
        return parse_network(text)
    except ValueError:
        raise FieldError(shown(text), _NETWORK, path=path, hint=_hint(text)) from None


def _hint(text: str) -> str:
    try:
        near = ipaddress.ip_network(text, strict=False)
    except ValueError:
        return ""
    return f"did you mean {near}?"
