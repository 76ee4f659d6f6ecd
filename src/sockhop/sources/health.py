"""How a service's backends are checked, as the compact form says it."""

from typing import Annotated

from msgspec import UNSET, Meta, Struct, UnsetType

from sockhop.model import HealthCheck
from sockhop.sources.fields import Duration, FieldError, milliseconds, shown

__all__ = ["HealthForm", "read_health"]

UrlPath = Annotated[
    str, Meta(pattern=r"^/[!-~]*\Z", description='an HTTP path such as "/health", without blanks')
]
Port = Annotated[int, Meta(ge=1, le=65535, description="a port from 1 to 65535")]
Times = Annotated[int, Meta(ge=1, le=1000, description="a whole number from 1 to 1000")]

_SHORTEST = 100
"""Milliseconds between two checks of a backend: more often is an attack on it."""


class HttpCheck(Struct, frozen=True, forbid_unknown_fields=True, gc=False):
    """A request that a healthy backend answers, at its own port or at another one."""

    path: UrlPath
    port: Port | UnsetType = UNSET


class TcpCheck(Struct, frozen=True, forbid_unknown_fields=True, gc=False):
    """A connection that a healthy backend takes."""

    port: Port | UnsetType = UNSET


class HealthForm(Struct, frozen=True, forbid_unknown_fields=True):
    """A check, how often, and after how many equal results it counts.

    The timeout is that of a kubelet's probe. A backend is not asked again before it has answered.
    """

    http: HttpCheck | UnsetType = UNSET
    tcp: TcpCheck | UnsetType = UNSET
    interval: Duration = "5s"
    timeout: Duration = "1s"
    rise: Times = 2
    fall: Times = 3


def read_health(form: HealthForm) -> HealthCheck:
    """Return the check that *form* asks for. FieldError's path starts at the service."""
    if (form.http is UNSET) == (form.tcp is UNSET):
        found = "none of http and tcp" if form.http is UNSET else "http and tcp"
        raise FieldError(found, "one of http, tcp", path=("health",))
    interval = milliseconds(form.interval)
    if interval < _SHORTEST:
        expected = f"at least {_SHORTEST}ms"
        raise FieldError(shown(form.interval), expected, path=("health", "interval"))
    kind = form.tcp if form.http is UNSET else form.http
    assert kind is not UNSET
    return HealthCheck(
        path=kind.path if isinstance(kind, HttpCheck) else "",
        port=0 if kind.port is UNSET else kind.port,
        interval=interval / 1000,
        timeout=milliseconds(form.timeout) / 1000,
        rise=form.rise,
        fall=form.fall,
    )
