"""From desired services to entries: which backends serve, and where loopback holds."""

import pytest

from sockhop.agent.target import expand, serving
from sockhop.datapath.records import FrontendFlag, FrontendKey
from sockhop.model import Backend, BackendState, Desired, Frontend, Protocol, Service, pack_address

pytestmark = pytest.mark.unit

HOME = 4110
NEAR, FAR = Backend("127.0.0.1", 8080), Backend("10.1.0.1", 8080)


def one(address: str, *backends: Backend) -> dict[FrontendKey, tuple[FrontendFlag, object]]:
    frontend = Frontend(address, 80, Protocol.TCP, backends=backends)
    entries = expand(Desired((Service("web", (frontend,)),)), HOME).entries
    return {key: (entry.flags, entry.backends) for key, entry in entries.items()}


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
