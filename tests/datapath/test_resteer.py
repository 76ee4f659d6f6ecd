"""Sockets of other programs that go from one backend to another."""

import errno
from collections.abc import Iterator
from pathlib import Path

import pytest

from sockhop.datapath.ending import choose_engine
from sockhop.datapath.listing import Listing
from sockhop.datapath.moving import Mover
from sockhop.datapath.outcome import Action
from sockhop.datapath.resteer import MoveOutcome, Obstacle, Resteerer
from sockhop.datapath.sockets import Socket
from sockhop.model import Service
from tests.datapath.node import Node, service
from tests.datapath.programs import Program
from tests.datapath.udp import FORMS, Echoes, both

pytestmark = pytest.mark.kernel

forms = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)


@pytest.fixture(scope="module")
def echoes(node: Node) -> Iterator[Echoes]:
    with Echoes(5) as made:
        yield made


@pytest.fixture
def program(node: Node) -> Iterator[Program]:
    node.install()
    with Program() as made:
        yield made


def at(number: int, *backends: object, **fields: object) -> Service:
    """A service at the numbered address of both families."""
    frontends = (f"10.9.0.{number}:53/udp", f"[fd00:9::{number}]:53/udp")
    return service(f"s{number}", *frontends, backends=backends, **fields)


def find(node: Node, *cookies: int) -> list[Socket]:
    """Return the sockets with these cookies, as they are now."""
    with Listing(node.sandbox.pins) as listing:
        found = {each.cookie: each for each in listing.here()}
    return [found[cookie] for cookie in cookies]


def move(node: Node, target: Socket | int, **options: bool) -> MoveOutcome:
    """Move a socket, given as it was or by its cookie, and else sever it."""
    target = target if isinstance(target, Socket) else find(node, target)[0]
    with choose_engine(node.sandbox.pins) as engine, Resteerer(node.sandbox.pins) as resteerer:
        (outcome,) = resteerer.resteer([target], engine.sever_sockets, **options)
        assert resteerer.obstacles[outcome.obstacle] == 1
    assert outcome.socket == target
    assert (outcome.obstacle is Obstacle.NONE) == (outcome.action is Action.RESTEERED)
    return outcome


def what(outcome: MoveOutcome) -> tuple[Action, Obstacle]:
    return outcome.action, outcome.obstacle


MOVED = (Action.RESTEERED, Obstacle.NONE)


def ask(program: Program, echoes: Echoes) -> int:
    """Send and receive through the socket of *program*; return which server answered."""
    program.do("own.send(b'who?')")
    request = echoes.received()
    request.reply()
    data, source = program.receive()
    assert source == program.peer
    assert int(data) == request.server
    return request.server


# --- what a program sees of it --------------------------------------------------------------------


@forms
def test_its_next_datagram_arrives(node: Node, echoes: Echoes, program: Program, form: str) -> None:
    node.install(at(1, *both(1)))
    dialled = form.format(1), 53
    cookie = program.dial(*dialled)
    program.do("own.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 10000)")
    assert ask(program, echoes) == 1
    before = program.do("(own.getsockname(), os.fstat(own.fileno()).st_ino)")
    node.install(at(1, *both(2)))
    assert what(move(node, cookie)) == MOVED
    assert program.do("(own.getsockname(), os.fstat(own.fileno()).st_ino)") == before
    assert program.do("own.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF)") == 20000
    assert program.peer == dialled
    assert ask(program, echoes) == 2


@forms
def test_it_goes_back_and_forth(node: Node, echoes: Echoes, program: Program, form: str) -> None:
    node.install(at(1, *both(1)))
    cookie = program.dial(form.format(1))
    for number in (2, 1, 2, 3):
        node.install(at(1, *both(number)))
        assert what(move(node, cookie)) == MOVED
        assert ask(program, echoes) == number
    # Where it was before counts until it is certain that it is not there.
    (now,) = find(node, cookie)
    assert now.origin is not None
    host = "::1" if now.remote_address[0] == 0 and not form.count(".") else "127.0.1.3"
    port = 7003 if host == "::1" else 7000
    assert node.live()[host, port] == 1


def refused(program: Program, dead: Echoes) -> None:
    """Let the program send to a server that has just gone, and the answer to that come."""
    dead.__exit__()
    program.do("own.send(b'who?')")
    assert program.do("len(select.select([own], [], [], 5)[0])")


def next_send(program: Program) -> str:
    try:
        program.do("own.send(b'who?')")
    except OSError as error:
        return errno.errorcode[error.errno or 0]
    return ""


def move_from_the_dead(node: Node, program: Program) -> None:
    node.install(at(1, *both(8)))
    with Echoes(1, first=8) as dead:
        cookie = program.dial("10.9.0.1")
        refused(program, dead)
    node.install(at(1, *both(1)))
    assert what(move(node, cookie)) == MOVED


def test_the_error_of_the_old_backend_is_taken_away(
    node: Node, echoes: Echoes, program: Program
) -> None:
    move_from_the_dead(node, program)
    assert next_send(program) == ""
    assert echoes.received().server == 1


def test_else_its_next_send_would_fail(
    node: Node, echoes: Echoes, program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mutant of the test above."""
    monkeypatch.setattr(Mover, "_confirm", lambda *_: "")
    move_from_the_dead(node, program)
    assert next_send(program) == "ECONNREFUSED"


def late_answer(node: Node, echoes: Echoes, program: Program, form: str) -> tuple[str, int]:
    """Return the source of an answer that the old backend has given, read after the move."""
    node.install(at(1, *both(1)))
    cookie = program.dial(form.format(1))
    program.do("own.send(b'who?')")
    echoes.received().reply()
    node.install(at(1, *both(2)))
    assert what(move(node, cookie)) == MOVED
    data, source = program.receive()
    assert data == b"1"
    return source


@forms
def test_a_late_answer_of_the_old_backend_keeps_its_source(
    node: Node, echoes: Echoes, program: Program, form: str
) -> None:
    assert late_answer(node, echoes, program, form) == (form.format(1), 53)


def test_else_it_would_come_from_the_backend(
    node: Node, echoes: Echoes, program: Program, tmp_path: Path
) -> None:
    with node.mutated(tmp_path, ("p->reason == REASON_RESTEER", "false")):
        assert late_answer(node, echoes, program, FORMS["IPv4"]) == ("127.0.1.1", 7000)
