"""LocalRedirectPolicies, joined with the Services and Pods that they name."""

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from sockhop.model import Backend, Frontend, FrontendType, Protocol, Redirect, Service
from sockhop.sources.fields import FieldError, FieldPath, parse_host, shown
from sockhop.sources.kubernetes_policy import ClusterPod, ClusterRedirect
from sockhop.sources.kubernetes_policy_objects import RedirectBackend, RedirectPort

__all__ = ["join_redirects"]


class _Listen(NamedTuple):
    address: str
    port: int
    protocol: Protocol
    name: str


class _Local(NamedTuple):
    """Where to, and whose sockets are exempt."""

    addresses: tuple[str, ...]
    cgroups: tuple[str, ...]


class _Refused(Exception):
    """A redirect that names what is not there."""


def join_redirects(
    found: Iterable[ClusterRedirect], services: Mapping[str, Service], pods: Iterable[ClusterPod]
) -> Iterator[Redirect]:
    """Return what each asks for, by name. *pods*: those of this node. Raises InputError.

    Of two that have the same frontend, the second is refused.
    """
    owners: dict[tuple[str, int, Protocol], str] = {}
    pods = list(pods)
    for redirect in sorted(found, key=lambda each: each.found.name):
        name = redirect.found.name
        try:
            made = _join(redirect, services, pods)
            for frontend in made.frontends:
                if frontend.key in owners:
                    raise _Refused(f"{frontend}: {owners[frontend.key]} redirects it already")
        except FieldError as error:
            raise redirect.place.error(error.under("spec")) from None
        except _Refused as error:
            yield Redirect(name, refused=(str(error),))
            continue
        owners |= dict.fromkeys((frontend.key for frontend in made.frontends), name)
        yield made


def _join(
    redirect: ClusterRedirect, services: Mapping[str, Service], pods: list[ClusterPod]
) -> Redirect:
    found = redirect.found
    listens = tuple(_listens(redirect, services))
    local = _local(redirect, pods)
    frontends = tuple(
        Frontend(
            listen.address,
            listen.port,
            listen.protocol,
            FrontendType.LOCAL_REDIRECT,
            listen.name,
            tuple(
                Backend(address, _port(listen, found.spec.redirect_backend))
                for address in _fitting(listen, local.addresses)
            ),
        )
        for listen in listens
    )
    return Redirect(found.name, frontends, local.cgroups)


def _listens(redirect: ClusterRedirect, services: Mapping[str, Service]) -> Iterator[_Listen]:
    """Return what is redirected."""
    matcher = redirect.found.spec.redirect_frontend
    address, wanted = matcher.address_matcher, matcher.service_matcher
    if (address is None) == (wanted is None):
        raise FieldError(
            "neither or both", "addressMatcher or serviceMatcher", path=("redirectFrontend",)
        )
    if address is not None:
        host = parse_host(address.ip)
        if not host:
            path = ("redirectFrontend", "addressMatcher", "ip")
            raise FieldError(shown(address.ip), "an IPv4 or IPv6 address", path=path)
        for port in address.to_ports:
            yield _Listen(host, port.port, Protocol(port.protocol or "TCP"), port.name or "")
        return
    assert wanted is not None
    name = f"{wanted.namespace or redirect.found.namespace}/{wanted.service_name}"
    if name not in services:
        raise _Refused(f"there is no Service {name}")
    frontends = [
        frontend
        for frontend in services[name].frontends
        if not wanted.to_ports or any(_is_port(port, frontend) for port in wanted.to_ports)
    ]
    if not frontends:
        raise _Refused(f"Service {name} has none of the ports that toPorts names")
    for frontend in frontends:
        yield _Listen(*frontend.key, frontend.port_name)


def _is_port(port: RedirectPort, frontend: Frontend) -> bool:
    return (port.port, Protocol(port.protocol or "TCP")) == frontend.key[1:] and (
        not port.name or port.name == frontend.port_name
    )


def _local(redirect: ClusterRedirect, pods: list[ClusterPod]) -> _Local:
    """Return where clients are sent to, and whose sockets are exempt."""
    backend = redirect.found.spec.redirect_backend
    selector, addresses = backend.local_endpoint_selector, backend.addresses
    if (selector is None) == (addresses is None):
        raise FieldError(
            "neither or both", "localEndpointSelector or addresses", path=("redirectBackend",)
        )
    if selector is None:
        if backend.cgroups is None:
            raise FieldError(
                "nothing",
                "the cgroups of the local backends ([] if they never dial what is redirected)",
                path=("redirectBackend", "cgroups"),
            )
        texts = [((*_at("addresses"), i), text) for i, text in enumerate(addresses or ())]
        return _Local(tuple(_host(*each) for each in texts), _cgroups(backend))
    chosen = [
        pod
        for pod in pods
        if pod.namespace == redirect.found.namespace and selector.matches(pod.labels)
    ]
    found = [_host(_at("localEndpointSelector"), text) for pod in chosen for text in pod.addresses]
    if not found:
        raise _Refused("localEndpointSelector: it selects no Pod with an address on this node")
    for pod in chosen:
        if not pod.cgroup:
            raise _Refused(f"the cgroup of Pod {pod.name} is not known")
    return _Local(tuple(found), (*(pod.cgroup for pod in chosen), *_cgroups(backend)))


def _at(name: str) -> FieldPath:
    return "redirectBackend", name


def _host(path: FieldPath, text: str) -> str:
    host = parse_host(text)
    if not host:
        raise FieldError(shown(text), "an IPv4 or IPv6 address", path=path)
    return host


def _cgroups(backend: RedirectBackend) -> tuple[str, ...]:
    for index, path in enumerate(backend.cgroups or ()):
        if not path.startswith("/"):
            where = (*_at("cgroups"), index)
            raise FieldError(shown(path), 'a path that begins with "/"', path=where)
    return tuple(backend.cgroups or ())


def _port(listen: _Listen, backend: RedirectBackend) -> int:
    """Return the port of the local backends that belongs to *listen*."""
    same = [p for p in backend.to_ports if Protocol(p.protocol or "TCP") is listen.protocol]
    named = [p for p in same if p.name and p.name == listen.name]
    if len(named) == 1 or len(same) == 1:
        return (named or same)[0].port
    raise _Refused(
        f"redirectBackend.toPorts: {len(same)} ports are {listen.protocol}, "
        f"none of them alone is named {shown(listen.name)} as port {listen.port} is"
    )


def _fitting(listen: _Listen, addresses: tuple[str, ...]) -> tuple[str, ...]:
    """Return the addresses that serve; IPv4 ones serve an IPv6 frontend where there is no other."""
    ipv6 = ":" in listen.address
    fitting = tuple(address for address in addresses if (":" in address) == ipv6)
    if ipv6 and not fitting:
        return addresses
    if not fitting:
        raise _Refused(f"no local backend has an IPv4 address, as {listen.address} is")
    return fitting
