"""Sockets of other programs that go from one backend to another."""

import errno
from pathlib import Path

import pytest

from sockhop.datapath.moving import Mover
from sockhop.datapath.records import Setting
from sockhop.model import unpack_address
from tests.datapath.programs import Program
from tests.datapath.udp import FORMS, Echoes, both
from tests.resteer.stage import MOVED, Stage, ask, at, what

pytestmark = pytest.mark.kernel

forms = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)


# --- what a program sees of it --------------------------------------------------------------------


@forms
def test_its_next_datagram_arrives(
    node: Stage, echoes: Echoes, program: Program, form: str
) -> None:
    node.install(at(1, *both(1)))
    dialled = form.format(1), 53
    cookie = program.dial(*dialled)
    program.do("own.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 10000)")
    assert ask(program, echoes) == 1
    before = program.do("(own.getsockname(), os.fstat(own.fileno()).st_ino)")
    node.install(at(1, *both(2)))
    assert what(node.move(cookie)) == MOVED
    assert program.do("(own.getsockname(), os.fstat(own.fileno()).st_ino)") == before
    assert program.do("own.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF)") == 20000
    assert program.peer == dialled
    assert ask(program, echoes) == 2


@forms
def test_it_goes_back_and_forth(node: Stage, echoes: Echoes, program: Program, form: str) -> None:
    node.install(at(1, *both(1)))
    cookie = program.dial(form.format(1))
    for number in (2, 1, 2, 3):
        node.install(at(1, *both(number)))
        assert what(node.move(cookie)) == MOVED
        assert ask(program, echoes) == number
    # Where it was before counts until it is certain that it is not there.
    now = node.find(cookie)
    assert node.live()[unpack_address(now.remote_address), now.remote_port] == 1


def test_a_socket_without_storage_is_moved(node: Stage, echoes: Echoes, program: Program) -> None:
    """What is remembered of it is in the LRU by its cookie."""
    setting = Path("/proc/sys/net/core/optmem_max")
    before = setting.read_text()
    node.install(at(1, *both(1)))
    setting.write_text("0")
    try:
        cookie = program.dial("10.9.0.1")
    finally:
        setting.write_text(before)
    assert node.maps.setting(Setting.FALLBACK)
    node.install(at(1, *both(2)))
    assert what(node.move(cookie)) == MOVED
    assert ask(program, echoes) == 2


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


def move_from_the_dead(node: Stage, program: Program) -> None:
    node.install(at(1, *both(8)))
    with Echoes(1, first=8) as dead:
        cookie = program.dial("10.9.0.1")
        refused(program, dead)
    node.install(at(1, *both(1)))
    assert what(node.move(cookie)) == MOVED


def test_the_error_of_the_old_backend_is_taken_away(
    node: Stage, echoes: Echoes, program: Program
) -> None:
    move_from_the_dead(node, program)
    assert next_send(program) == ""
    assert echoes.received().server == 1


def test_else_its_next_send_would_fail(
    node: Stage, echoes: Echoes, program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mutant of the test above."""
    monkeypatch.setattr(Mover, "_confirm", lambda *_: "")
    move_from_the_dead(node, program)
    assert next_send(program) == "ECONNREFUSED"


def late_answer(node: Stage, echoes: Echoes, program: Program, form: str) -> tuple[str, int]:
    """Return the source of an answer that the old backend has given, read after the move."""
    node.install(at(1, *both(1)))
    cookie = program.dial(form.format(1))
    program.do("own.send(b'who?')")
    echoes.received().reply()
    node.install(at(1, *both(2)))
    assert what(node.move(cookie)) == MOVED
    data, source = program.receive()
    assert data == b"1"
    return source


@forms
def test_a_late_answer_of_the_old_backend_keeps_its_source(
    node: Stage, echoes: Echoes, program: Program, form: str
) -> None:
    assert late_answer(node, echoes, program, form) == (form.format(1), 53)


def test_else_it_would_come_from_the_backend(
    node: Stage, echoes: Echoes, program: Program, tmp_path: Path
) -> None:
    with node.mutated(tmp_path, ("p->reason == REASON_RESTEER", "false")):
        assert late_answer(node, echoes, program, FORMS["IPv4"]) == ("127.0.1.1", 7000)
