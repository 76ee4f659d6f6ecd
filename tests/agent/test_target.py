"""From desired services to entries: which backends serve, and where loopback holds."""

from typing import Any

import pytest

from sockhop.agent.target import expand, serving
from sockhop.datapath.records import FrontendFlag, FrontendKey
from sockhop.model import (
    Backend,
    BackendState,
    Clients,
    Desired,
    Frontend,
    Protocol,
    Service,
    pack_address,
)

pytestmark = pytest.mark.unit

HOME = 4110
NEAR, FAR = Backend("127.0.0.1", 8080), Backend("10.1.0.1", 8080)


def one(address: str, *backends: Backend) -> dict[FrontendKey, tuple[FrontendFlag, object]]:
    frontend = Frontend(address, 80, Protocol.TCP, backends=backends)
    entries = expand(Desired((Service("web", (frontend,)),)), HOME).entries
    return {key: (entry.flags, entry.backends) for key, entry in entries.items()}


ELSEWHERE = {"/run/netns/a": 21, "/run/netns/b": 22}


def where(address: str, namespaces: Any, *backends: Backend) -> dict[int, tuple[Backend, ...]]:
    """Where a service with such `clients` holds, and what it has there; 0 for everywhere."""
    frontend = Frontend(address, 80, Protocol.TCP, backends=backends)
    service = Service("web", (frontend,), clients=Clients(namespaces))
    entries = expand(Desired((service,)), HOME, ELSEWHERE).entries
    return {
        key.netns: entry.backends
        for key, entry in entries.items()
        if not entry.flags & FrontendFlag.ABSENT
    }


def test_clients_choose_the_namespaces() -> None:
    assert where("10.0.0.1", None, FAR) == {0: (FAR,)}
    assert where("10.0.0.1", "all", FAR, NEAR) == {0: (FAR,), HOME: (FAR, NEAR)}
    assert where("10.0.0.1", "host", FAR, NEAR) == {HOME: (FAR, NEAR)}
    assert where("127.96.0.1", "all", FAR) == {0: (FAR,)}
    assert where("127.96.0.1", None, FAR, NEAR) == {HOME: (FAR, NEAR)}
    two = ("/run/netns/a", "/run/netns/b", "/run/netns/gone")
    assert where("127.96.0.1", two, FAR, NEAR) == {21: (FAR,), 22: (FAR,)}


def key(address: str, netns: int) -> FrontendKey:
    return FrontendKey(pack_address(address), netns, 80, 6)


def test_a_routed_frontend_holds_everywhere() -> None:
    assert one("10.0.0.1", FAR) == {key("10.0.0.1", 0): (FrontendFlag(0), (FAR,))}


def test_a_loopback_frontend_holds_at_home_only() -> None:
    assert one("127.96.0.1", FAR) == {
        key("127.96.0.1", HOME): (FrontendFlag(0), (FAR,)),
        key("127.96.0.1", 0): (FrontendFlag.SCOPED | FrontendFlag.ABSENT, ()),
    }


def test_a_loopback_backend_serves_at_home_only() -> None:
    assert one("10.0.0.1", NEAR, FAR) == {
        key("10.0.0.1", HOME): (FrontendFlag(0), (NEAR, FAR)),
        key("10.0.0.1", 0): (FrontendFlag.SCOPED, (FAR,)),
    }


def test_terminating_serve_only_where_nothing_is_active() -> None:
    going = Backend("10.1.0.2", 80, BackendState.TERMINATING)
    idle = Backend("10.1.0.3", 80, weight=0)
    broken = Backend("10.1.0.4", 80, BackendState.QUARANTINED)
    fallback = (BackendState.TERMINATING,)
    assert serving([going, FAR, idle, broken], fallback) == (FAR,)
    assert serving([going, idle, broken], fallback) == (going,)
    assert serving([idle, broken], fallback) == ()
    assert serving([idle, broken, going], [BackendState.QUARANTINED]) == (broken,)
