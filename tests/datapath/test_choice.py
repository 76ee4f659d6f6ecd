"""Who gets a new connection: session affinity, backends' states, and frontends nobody may bind."""

import errno
import socket
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sockhop.agent import target
from sockhop.model import Algorithm, Backend, BackendState, is_loopback
from tests.clients.dialers import family_of
from tests.datapath.node import Node, backend, service

pytestmark = pytest.mark.kernel

VIP, VIP6 = "10.9.2.1", "fd00:9:2::1"
BACKENDS = ONE, TWO, THREE = tuple(f"127.0.1.{number}:7000" for number in (1, 2, 3))
HOUR = 3600
# Against this weight one of weight 1 gets a new connection once in 65,536 times.
HEAVY = 65535
PLENTY = 40


@pytest.fixture(autouse=True)
def _fresh_services(node: Node) -> None:
    node.install()


def install(node: Node, *backends: Backend, seconds: int = 0, **fields: object) -> None:
    node.install(
        service("s", f"{VIP}:53/udp", backends=backends, affinity_seconds=seconds, **fields)
    )


def dial(node: Node) -> str:
    """Connect anew and return the backend."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.connect((VIP, 53))
        host, port = node.chosen(client.fileno())
        return f"{host}:{port}"


# --- session affinity ----------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", Algorithm)
def test_a_client_stays_with_its_backend(node: Node, algorithm: Algorithm) -> None:
    everyone = [backend(text) for text in (ONE, TWO, THREE)]
    install(node, *everyone, seconds=HOUR, algorithm=algorithm)
    assert len({dial(node) for _ in range(PLENTY)}) == 1
    install(node, *everyone, algorithm=algorithm)
    assert len({dial(node) for _ in range(PLENTY)}) == 3


def drawn_to_the_light_one(node: Node, **changes: Any) -> bool:
    """Make the client one of ONE, then let TWO be far heavier; return whether it stays."""
    seconds = changes.pop("seconds", HOUR)
    install(node, backend(ONE), seconds=seconds)
    assert dial(node) == ONE
    install(node, backend(ONE, **changes), backend(TWO, weight=HEAVY), seconds=seconds)
    time.sleep(1.05 if seconds == 1 else 0)
    return dial(node) == ONE


def test_affinity_ends_with_its_time_its_backend_and_its_weight(node: Node) -> None:
    assert drawn_to_the_light_one(node)
    assert not drawn_to_the_light_one(node, seconds=1)
    assert not drawn_to_the_light_one(node, weight=0)
    for state in (s for s in BackendState if s is not BackendState.ACTIVE):
        assert not drawn_to_the_light_one(node, state=state)


def test_each_use_renews_the_time(node: Node) -> None:
    install(node, backend(ONE), seconds=1)
    assert dial(node) == ONE
    install(node, backend(ONE), backend(TWO, weight=HEAVY), seconds=1)
    for _ in range(4):
        time.sleep(0.4)
        assert dial(node) == ONE


@pytest.mark.parametrize(
    ("change", "fields"),
    [
        (("(last->seen) >= seconds * SECOND", "(last->seen) >= 9 * seconds * SECOND"),
         {"seconds": 1}),
        (("if (!found || READ_ONCE(found->state) != state ||", "if (!found ||"),
         {"state": BackendState.QUARANTINED}),
        (("serves(last, frontend->service, BACKEND_ACTIVE, 1,",
          "serves(last, frontend->service, BACKEND_ACTIVE, 0,"), {"weight": 0}),
    ],
)  # fmt: skip
def test_affinity_without_its_limits_is_noticed(
    node: Node, tmp_path: Path, change: tuple[str, str], fields: dict[str, Any]
) -> None:
    with node.mutated(tmp_path, change):
        assert drawn_to_the_light_one(node, **fields)


def test_forgotten_affinity_is_noticed(node: Node, tmp_path: Path) -> None:
    with node.mutated(tmp_path, ("if (frontend->affinity) {\n\t\tclient", "if (0) {\n\t\tclient")):
        assert not drawn_to_the_light_one(node)


# --- a frontend of one namespace that goes while it is read ---------------------------------------

# What a hook finds for its namespace has become another one's, and then there is nothing.
REUSED = (
    "\t\tif (!found)\n\t\t\treturn false;\n\t\tid =",
    "\t\tif (!found || (key->netns && attempt))\n\t\t\treturn false;\n\t\tid =",
)
ANOTHERS = (
    "READ_ONCE(found->key.netns) == key->netns &&",
    "READ_ONCE(found->key.netns) == key->netns && !key->netns &&",
)
TAKES_IT = ("id = READ_ONCE(found->id);", "id = copy->id = READ_ONCE(found->id);")


def test_what_goes_while_it_is_read_leads_nowhere(node: Node, tmp_path: Path) -> None:
    """Then the general entry holds, where loopback backends do not serve."""
    everywhere = "10.96.1.1:7000"
    install(node, backend(ONE), backend(everywhere))
    assert {dial(node) for _ in range(PLENTY)} == {ONE, everywhere}
    with node.mutated(tmp_path / "reused", REUSED, ANOTHERS):
        assert {dial(node) for _ in range(PLENTY)} == {everywhere}
    with node.mutated(tmp_path / "taken", REUSED, ANOTHERS, TAKES_IT):
        assert ONE in {dial(node) for _ in range(PLENTY)}


# --- states --------------------------------------------------------------------------------------

states = st.lists(st.sampled_from(BackendState), min_size=1, max_size=3)
fallbacks = st.lists(
    st.sampled_from([BackendState.TERMINATING, BackendState.QUARANTINED]), unique=True
)
live_settings = settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def served_by(node: Node, some: list[BackendState], fallback: list[BackendState]) -> set[str]:
    install(
        node,
        *[backend(text, state=state) for text, state in zip(BACKENDS, some, strict=False)],
        fallback=tuple(fallback),
    )
    try:
        return {dial(node) for _ in range(PLENTY)}
    except OSError as error:
        assert error.errno == errno.EHOSTUNREACH
        return set()


def should_serve(some: list[BackendState], fallback: list[BackendState]) -> set[str]:
    for wanted in (BackendState.ACTIVE, *fallback):
        if wanted in some:
            return {text for text, state in zip(BACKENDS, some, strict=False) if state is wanted}
    return set()


@live_settings
@given(states, fallbacks)
def test_new_connections_go_to_the_right_states(
    node: Node, some: list[BackendState], fallback: list[BackendState]
) -> None:
    assert served_by(node, some, fallback) == should_serve(some, fallback)


def test_states_that_are_not_looked_at_are_noticed(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(target, "serving", lambda backends, _: tuple(backends))
    case = [BackendState.ACTIVE, BackendState.MAINTENANCE]
    assert served_by(node, case, []) != should_serve(case, [])


# --- reserved frontends --------------------------------------------------------------------------


def bind(host: str, port: int, kind: socket.SocketKind) -> int:
    """Return 0, or the errno that bind() gives."""
    with socket.socket(family_of(host), kind) as server:
        try:
            server.bind((host, port))
        except OSError as error:
            return error.errno or -1
    return 0


def reserved(node: Node, *, reserve: bool) -> dict[tuple[str, int, str], int]:
    # Both are addresses of the namespace's own, so that only a hook can say no.
    here, here6 = "10.96.0.1", "fd00:96::1"
    frontends = (f"{here}:80/tcp", f"{here}:53/udp", f"[{here6}]:80/tcp")
    node.install(service("s", *frontends, backends=[ONE, "[::1]:7000"], reserve=reserve))
    return {
        (host, port, kind.name): bind(host, port, kind)
        for host in (here, here6, f"::ffff:{here}", "127.0.0.1")
        for port in (80, 53)
        for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM)
    }


def test_a_reserved_frontend_cannot_be_bound(node: Node, tmp_path: Path) -> None:
    assert not is_loopback("10.96.0.1")
    assert set(reserved(node, reserve=False).values()) == {0}
    refused = {where for where, error in reserved(node, reserve=True).items() if error}
    wanted = {
        ("10.96.0.1", 80, "SOCK_STREAM"),
        ("10.96.0.1", 53, "SOCK_DGRAM"),
        ("fd00:96::1", 80, "SOCK_STREAM"),
        ("::ffff:10.96.0.1", 80, "SOCK_STREAM"),
        ("::ffff:10.96.0.1", 53, "SOCK_DGRAM"),
    }
    assert refused == wanted
    assert set(reserved(node, reserve=True).values()) == {0, errno.EADDRINUSE}
    with node.mutated(tmp_path, ("!(frontend.flags & FRONTEND_RESERVED)", "1")):
        assert set(reserved(node, reserve=True).values()) == {0}
