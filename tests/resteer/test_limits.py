"""What cannot be moved, or not everywhere, and what becomes of it."""

import socket
import subprocess
from pathlib import Path

import pytest

from sockhop.datapath.candidates import Fitting
from sockhop.datapath.outcome import Action
from sockhop.datapath.resteer import Obstacle, Resteerer
from sockhop.model import BackendState, Service
from tests.datapath.node import backend, service
from tests.datapath.programs import Program
from tests.datapath.udp import Echoes, both
from tests.resteer.stage import MOVED, VIP, Stage, ask, at, fate, what

pytestmark = pytest.mark.kernel


@pytest.fixture(scope="module")
def wires(node: Stage) -> None:
    """Two networks: 10.50.0.0/24, where the node is .1, and 10.51.0.0/24, the same."""
    for number in (50, 51):
        for command in (
            f"link add wire{number} type veth peer name end{number}",
            f"addr add 10.{number}.0.1/24 dev wire{number}",
            f"link set wire{number} up",
            f"link set end{number} up",
        ):
            subprocess.run(["ip", *command.split()], check=True)


def assert_severed(program: Program) -> None:
    assert fate(program) == "ECONNABORTED"
    with pytest.raises(OSError, match="not connected"):
        program.do("own.getpeername()")


# --- the source address ---------------------------------------------------------------------------


def dial_over_there(node: Stage, program: Program, source: str = "") -> int:
    node.install(at(1, "10.50.0.2:7000"))
    return program.dial(VIP, source=source)


def test_a_socket_at_loopback_cannot_leave_the_node(
    node: Stage, wires: None, program: Program
) -> None:
    cookie = program.dial(VIP)
    node.install(at(1, "10.50.0.2:7000"))
    outcome = node.move(cookie)
    assert what(outcome) == (Action.SEVERED, Obstacle.SOURCE)
    assert outcome.reason == (
        "not moved: its source address is 127.0.0.1, and 10.50.0.2:7000 needs 10.50.0.1"
    )
    assert_severed(program)


def other_network(node: Stage, program: Program) -> tuple[Action, Obstacle]:
    cookie = dial_over_there(node, program)
    node.install(at(1, "10.51.0.2:7000"))
    return what(node.move(cookie))


def test_nor_one_between_networks(node: Stage, wires: None, program: Program) -> None:
    assert other_network(node, program) == (Action.SEVERED, Obstacle.SOURCE)
    assert_severed(program)


def test_else_it_would_send_from_an_address_of_the_other_network(
    node: Stage, wires: None, program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mutant without a check of the source; at loopback, connect() says so itself."""
    monkeypatch.setattr(Fitting, "source", lambda _self, _own, traits, _to: traits.local)
    assert other_network(node, program) == MOVED
    assert program.do("own.getsockname()")[0] == "10.50.0.1"
    node.install(at(1, *both(1)))
    cookie = program.dial(VIP)
    node.install(at(1, "10.50.0.2:7000"))
    outcome = node.move(cookie)
    assert what(outcome) == (Action.SEVERED, Obstacle.CONNECT)
    assert "EINVAL" in outcome.reason
    assert_severed(program)


@pytest.mark.parametrize(
    ("first", "then"),
    [("10.50.0.2:7000", both(1)[0]), ("[fd00:96::1]:9", both(1)[1])],
    ids=["IPv4", "IPv6"],
)
def test_within_the_node_every_address_will_do(
    node: Stage, wires: None, echoes: Echoes, program: Program, first: str, then: str
) -> None:
    node.install(at(1, first))
    cookie = program.dial("fd00:9::1" if "[" in first else VIP)
    source = program.do("own.getsockname()")
    node.install(at(1, then))
    assert what(node.move(cookie)) == MOVED
    assert ask(program, echoes) == 1
    assert program.do("own.getsockname()") == source
    node.install(at(1, first))
    assert what(node.move(cookie)) == MOVED
    assert node.peer(cookie) == first


@pytest.mark.parametrize("algorithm", ["random", "round-robin", "maglev", "least-connections"])
def test_a_backend_is_chosen_that_fits(
    node: Stage, wires: None, program: Program, algorithm: str
) -> None:
    cookie = dial_over_there(node, program)
    for number in range(3, 15):
        fits = f"10.50.0.{number}:7000"
        node.install(at(1, "10.51.0.2:7000", fits, "10.51.0.3:7000", algorithm=algorithm))
        assert what(node.move(cookie)) == MOVED
        assert node.peer(cookie) == fits


def test_an_address_that_the_program_has_bound_goes_everywhere_where_there_is_a_route(
    node: Stage, wires: None, program: Program
) -> None:
    cookie = dial_over_there(node, program, source="10.50.0.1")
    node.install(at(1, "10.51.0.2:7000"))
    assert what(node.move(cookie)) == MOVED
    assert node.peer(cookie) == "10.51.0.2:7000"
    node.install(at(1, *both(1)))
    cookie = program.dial(VIP, source="127.0.0.1")
    node.install(at(1, "10.51.0.2:7000"))
    outcome = node.move(cookie)
    assert what(outcome) == (Action.SEVERED, Obstacle.SOURCE)
    assert "no route from its source address 127.0.0.1" in outcome.reason


@pytest.mark.parametrize("option", ["SO_BINDTODEVICE", "IP_UNICAST_IF"])
def test_an_interface_that_the_program_has_chosen_counts(
    node: Stage, wires: None, program: Program, option: str
) -> None:
    """The kernel then takes everything for being at that interface."""
    node.install(at(1, "10.50.0.2:7000"))
    program.do("own = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)")
    if option == "SO_BINDTODEVICE":
        program.do("own.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b'wire50')")
    else:
        program.do("own.setsockopt(0, 50, socket.htonl(socket.if_nametoindex('wire50')))")
    program.do(f"own.connect(({VIP!r}, 53))")
    node.install(at(1, "10.51.0.2:7000"))
    assert what(node.move(program.cookie)) == MOVED
    assert program.do("own.getsockname()")[0] == "10.50.0.1"


# --- where there is nothing to move to ------------------------------------------------------------


@pytest.mark.parametrize("state", [None, *BackendState])
def test_a_socket_stays_while_no_other_backend_is_active(
    node: Stage, echoes: Echoes, program: Program, state: BackendState | None
) -> None:
    cookie = program.dial(VIP)
    one = [] if state is None else [backend(each, state=state) for each in both(1)]
    node.install(at(1, *one))
    assert what(node.move(cookie)) == (Action.LEFT, Obstacle.NO_BACKEND)
    assert node.peer(cookie) == "127.0.1.1:7000"
    node.install(at(1, *one, *both(2)))
    assert what(node.move(cookie)) == MOVED
    assert ask(program, echoes) == 2


def test_by_hand_it_leaves_a_backend_that_serves(
    node: Stage, echoes: Echoes, program: Program
) -> None:
    node.install(at(1, *both(1, 2)))
    cookie = program.dial(VIP)
    for _ in range(20):
        before = node.peer(cookie)
        assert what(node.move(cookie)) == MOVED
        assert node.peer(cookie) != before


def test_a_socket_of_a_service_that_is_gone_is_severed(node: Stage, program: Program) -> None:
    cookie = program.dial(VIP)
    node.install()
    outcome = node.move(cookie)
    assert what(outcome) == (Action.SEVERED, Obstacle.NO_SERVICE)
    assert outcome.reason == "not moved: 10.9.0.1:53 is no frontend any more"
    assert_severed(program)


def test_or_goes_to_what_it_dialled_where_that_was_redirected(
    node: Stage, echoes: Echoes, program: Program
) -> None:
    node.install()
    cookie = program.dial("127.0.1.2", 7000)
    assert what(node.move(cookie)) == (Action.LEFT, Obstacle.UNMANAGED)
    assert ask(program, echoes) == 2
    node.install(service("local", "127.0.1.2:7000/udp", backends=["127.0.1.1:7000"]))
    assert what(node.move(cookie)) == MOVED
    assert ask(program, echoes) == 1
    node.install()
    assert what(node.move(cookie, direct=True)) == MOVED
    assert ask(program, echoes) == 2


def test_nothing_is_moved_in_bypass(node: Stage, echoes: Echoes, program: Program) -> None:
    cookie = program.dial(VIP)
    node.install(at(1, *both(2)))
    with node.bypassed():
        assert what(node.move(cookie)) == (Action.LEFT, Obstacle.BYPASS)
    assert node.peer(cookie) == "127.0.1.1:7000"


def test_a_socket_that_no_hook_balances_any_more_is_severed(
    node: Stage, wires: None, program: Program, tmp_path: Path
) -> None:
    def services(backend: str) -> Service:
        return service("routable", "10.50.0.9:53/udp", backends=[backend])

    node.install(services("10.50.0.2:7000"))
    cookie = program.dial("10.50.0.9")
    node.install(services("10.50.0.3:7000"))
    chooses = "\tif (move && move->backend ?"
    with node.mutated(tmp_path, (chooses, f"\treturn PASS;\n{chooses}")):
        assert what(node.move(cookie)) == (Action.SEVERED, Obstacle.NOT_BALANCED)
    assert_severed(program)


def test_so_is_one_whose_connect_is_refused(node: Stage, program: Program, tmp_path: Path) -> None:
    """By a policy, or another tool."""
    cookie = program.dial(VIP)
    node.install(at(1, *both(2)))
    changes = ("#define ECANCELED 125", "#define ECANCELED 1"), ("!is_still_there(ctx, move)", "1")
    with node.mutated(tmp_path, *changes):
        assert what(node.move(cookie)) == (Action.SEVERED, Obstacle.CONNECT)
    assert_severed(program)


def test_tcp_is_severed(node: Stage, program: Program) -> None:
    with socket.create_server(("127.0.1.1", 7000)):
        program.do("own = socket.create_connection(('127.0.1.1', 7000))")
        outcome = node.move(program.cookie)
    assert what(outcome) == (Action.SEVERED, Obstacle.KIND)
    assert fate(program) == "ECONNABORTED"


def test_unconnected_udp_is_never_touched(node: Stage, program: Program) -> None:
    program.do("own = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)")
    program.do("own.bind(('127.0.0.1', 0))")
    assert what(node.move(program.cookie)) == (Action.LEFT, Obstacle.KIND)
    assert fate(program) == ""


def test_without_a_way_to_sever_everything_stays(node: Stage, program: Program) -> None:
    target = node.find(program.dial(VIP))
    node.install()
    with Resteerer(node.sandbox.pins) as resteerer:
        (outcome,) = resteerer.resteer([target], None)
    assert what(outcome) == (Action.LEFT, Obstacle.NO_SERVICE)
    assert fate(program) == ""
