"""Programs that connect a socket elsewhere just when it is being moved."""

import os
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest

from sockhop.datapath import moving
from sockhop.datapath.memory import SocketMemory
from sockhop.datapath.moving import Kept, Mover
from sockhop.datapath.outcome import Action
from sockhop.datapath.records import Move, Setting, Watch
from sockhop.datapath.resteer import Obstacle, Resteerer
from sockhop.kernel.procfs import borrowed
from sockhop.model import unpack_address
from tests.datapath.node import service
from tests.datapath.programs import Program
from tests.datapath.udp import FORMS, both
from tests.resteer.stage import OTHER, VIP, Stage, at, fate, leave_one, what

pytestmark = pytest.mark.kernel

NO_LOOK = "watch->dials || !is_still_there(ctx, move)", "0"
NO_NOTE = "watch->dials++;", ";"
GONE = (Action.GONE, Obstacle.ELSEWHERE)


# --- before the hook looks ------------------------------------------------------------------------


def before_connect(monkeypatch: pytest.MonkeyPatch, action: Callable[[], object]) -> None:
    """Do something at the last moment before the socket is connected."""
    connect = Mover._connect

    def late(self: Mover, *seen: object) -> None:
        action()
        connect(self, *seen)  # type: ignore[arg-type]

    monkeypatch.setattr(Mover, "_connect", late)


ELSEWHERE = {
    "another service": (f"own.connect(({OTHER!r}, 53))", "127.0.1.3:7000"),
    "the same service": (f"own.connect(({VIP!r}, 53))", "127.0.1.2:7000"),
    "no service": ("own.connect(('127.0.1.4', 7000))", "127.0.1.4:7000"),
}
NOWHERE = "ctypes.CDLL(None).connect(own.fileno(), struct.pack('=H14x', 0), 16)", "0.0.0.0:0"
elsewhere = pytest.mark.parametrize(
    ("line", "then"), [*ELSEWHERE.values(), NOWHERE], ids=[*ELSEWHERE, "nowhere"]
)


@elsewhere
def test_what_goes_elsewhere_meanwhile_is_not_moved(
    node: Stage, program: Program, monkeypatch: pytest.MonkeyPatch, line: str, then: str
) -> None:
    cookie = program.dial(VIP)
    leave_one(node)
    before_connect(monkeypatch, lambda: program.do(line))
    assert what(node.move(cookie)) == GONE
    assert node.peer(cookie) == then
    assert fate(program) == ""


def test_nor_where_a_hook_can_only_say_eperm(
    node: Stage, program: Program, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Before Linux 5.18."""
    with node.mutated(tmp_path, ("#define ECANCELED 125", "#define ECANCELED 1")):
        for line, then in (*ELSEWHERE.values(), NOWHERE):
            node.install(at(1, *both(1)), at(2, *both(3)))
            cookie = program.dial(VIP)
            leave_one(node)
            with monkeypatch.context() as patch:
                before_connect(patch, lambda: program.do(line))  # noqa: B023
                assert node.move(cookie).action in (Action.GONE, Action.LEFT)
            assert node.peer(cookie) == then
            assert fate(program) == ""


def test_else_it_would_be_taken_away(
    node: Stage, program: Program, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The mutant of the first test. One that was disconnected still shows it by its port."""
    with node.mutated(tmp_path, NO_LOOK):
        for line, _ in ELSEWHERE.values():
            node.install(at(1, *both(1)), at(2, *both(3)))
            cookie = program.dial(VIP)
            leave_one(node)
            with monkeypatch.context() as patch:
                before_connect(patch, lambda: program.do(line))  # noqa: B023
                node.move(cookie)
            assert node.peer(cookie) == "127.0.1.2:7000"


def test_what_went_elsewhere_before_is_not_moved(node: Stage, program: Program) -> None:
    target = node.find(program.dial(VIP))
    leave_one(node)
    program.do(f"own.connect(({VIP!r}, 53))")
    node.install(at(1, *both(4)), at(2, *both(3)))
    assert what(node.move(target)) == GONE
    assert node.peer(target.cookie) == "127.0.1.2:7000"


def test_the_program_may_connect_while_others_are_moved(
    node: Stage, program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hook tells its connect from ours, though it knows that the socket is being moved."""
    cookie = program.dial(VIP)
    leave_one(node)
    confirm = Mover._confirm

    def late(self: Mover, seen: object) -> str:
        program.do(f"own.connect(({OTHER!r}, 53))")
        return confirm(self, seen)  # type: ignore[arg-type]

    monkeypatch.setattr(Mover, "_confirm", late)
    monkeypatch.setattr("sockhop.kernel.maps.Map.delete", lambda *_: True)
    assert what(node.move(cookie)) == GONE
    assert node.peer(cookie) == "127.0.1.3:7000"


# --- between the look and the connect -------------------------------------------------------------


@contextmanager
def at_that_moment(
    node: Stage, monkeypatch: pytest.MonkeyPatch, *actions: Callable[[], object]
) -> Iterator[None]:
    """After each connect of the mover do the next of *actions*, and that connect once more.

    Nothing stops the kernel between a hook and the connect that it lets through. But to the socket
    it is all the same whether the first one comes before that or is followed by a second one that
    no hook sees.
    """
    dial, left = Mover._dial, list(actions)

    def twice(self: Mover, seen: moving._Seen, *how: object) -> None:
        dial(self, seen, *how)  # type: ignore[arg-type]
        if left:
            there = self._peer(seen)
            assert there is not None
            left.pop(0)()
            with node.bypassed():
                seen.own.connect(moving._sockaddr(seen.own, there))

    with monkeypatch.context() as patch:
        patch.setattr(Mover, "_dial", twice)
        yield


class Form(NamedTuple):
    """What a program dials, then dials instead, and where that is."""

    first: str
    line: str
    then: str


BY_IPV4 = "struct.pack('=H', 2) + struct.pack('!H4s8x', 53, socket.inet_aton('10.9.0.2'))"
AT_THAT_MOMENT = {name: Form(VIP, *each) for name, each in ELSEWHERE.items()} | {
    "IPv6": Form(FORMS["IPv6"].format(1), "own.connect(('fd00:9::2', 53))", "[::1]:7003"),
    "IPv6, no service": Form(FORMS["IPv6"].format(1), "own.connect(('::1', 7004))", "[::1]:7004"),
    "mapped": Form(
        FORMS["mapped"].format(1), "own.connect(('::ffff:10.9.0.2', 53))", "127.0.1.3:7000"
    ),
    "IPv4 on an IPv6 socket": Form(
        FORMS["mapped"].format(1),
        f"ctypes.CDLL(None).connect(own.fileno(), {BY_IPV4}, 16)",
        "127.0.1.3:7000",
    ),
}
moments = pytest.mark.parametrize("form", AT_THAT_MOMENT.values(), ids=AT_THAT_MOMENT)


def dial_in_between(
    node: Stage, program: Program, monkeypatch: pytest.MonkeyPatch, form: Form
) -> tuple[tuple[Action, Obstacle], str]:
    """Return what became of the move and where the socket is."""
    node.install(at(1, *both(1)), at(2, *both(3)))
    cookie = program.dial(form.first)
    leave_one(node)
    with at_that_moment(node, monkeypatch, lambda: program.do(form.line)):
        done = what(node.move(cookie))
    return done, node.peer(cookie)


@moments
def test_what_goes_elsewhere_at_that_moment_is_put_back(
    node: Stage, program: Program, monkeypatch: pytest.MonkeyPatch, form: Form
) -> None:
    assert dial_in_between(node, program, monkeypatch, form) == (GONE, form.then)
    assert fate(program) == ""
    if "own.connect" in form.line:
        told = program.peer
        program.do(form.line)
        assert told == program.peer


def test_it_is_known_where_it_was_put_back(
    node: Stage, program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    dial_in_between(node, program, monkeypatch, AT_THAT_MOMENT["another service"])
    assert node.find(program.cookie).current
    assert node.live()["127.0.1.3", 7000] == 1


def test_what_goes_elsewhere_while_it_is_put_back_is_put_there(
    node: Stage, program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    cookie = program.dial(VIP)
    leave_one(node)
    lines = (
        f"own.connect(({OTHER!r}, 53))",
        "own.connect(('127.0.1.4', 7000))",
        "own.connect(('127.0.1.5', 7000))",
    )
    with at_that_moment(node, monkeypatch, *(lambda line=line: program.do(line) for line in lines)):
        assert what(node.move(cookie)) == GONE
    assert node.peer(cookie) == "127.0.1.5:7000"


def test_what_leaves_again_before_anybody_looks_stays_away(
    node: Stage, program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was connected after us, and then disconnected."""
    cookie = program.dial(VIP)
    leave_one(node)
    give_way = Mover._give_way

    def late(self: Mover, seen: moving._Seen) -> None:
        program.do(f"own.connect(({OTHER!r}, 53))")
        program.do(NOWHERE[0])
        give_way(self, seen)

    monkeypatch.setattr(Mover, "_give_way", late)
    assert what(node.move(cookie)) == GONE
    assert node.peer(cookie) == "0.0.0.0:0"


def test_what_is_disconnected_at_that_moment_is_severed(
    node: Stage, program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    form = Form(VIP, *NOWHERE)
    done = dial_in_between(node, program, monkeypatch, form)
    assert done == ((Action.SEVERED, Obstacle.NOT_PUT_BACK), form.then)
    assert fate(program) == "ECONNABORTED"


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6], ids=["IPv4", "IPv6"])
def test_for_that_it_gets_a_port(node: Stage, family: socket.AddressFamily) -> None:
    """It has none where it was disconnected after the kernel had looked whether it has one."""
    with socket.socket(family, socket.SOCK_DGRAM) as own:
        assert own.getsockname()[1] == 0
        moving._bind(own)
        assert own.getsockname()[1]


def test_one_that_does_not_stop_is_severed(
    node: Stage, program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    cookie = program.dial(VIP)
    leave_one(node)
    lines = f"own.connect(({OTHER!r}, 53))", "own.connect(('127.0.1.4', 7000))"
    dials = [lambda line=line: program.do(line) for line in lines * 100]
    with at_that_moment(node, monkeypatch, *dials):
        assert what(node.move(cookie)) == (Action.SEVERED, Obstacle.NOT_PUT_BACK)
    assert fate(program) == "ECONNABORTED"


def test_so_is_one_that_cannot_go_where_it_should(
    node: Stage, program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own connect has failed, too, but nobody knows."""

    def dial_in_vain() -> None:
        with pytest.raises(OSError, match="unreachable"):
            program.do("own.connect(('10.99.0.1', 9))")

    cookie = program.dial(VIP)
    leave_one(node)
    with at_that_moment(node, monkeypatch, dial_in_vain):
        outcome = node.move(cookie)
    assert what(outcome) == (Action.SEVERED, Obstacle.NOT_PUT_BACK)
    assert outcome.reason == (
        "not moved: its program has connected it meanwhile; "
        "again, connect() says Network is unreachable (ENETUNREACH)"
    )
    assert fate(program) == "ECONNABORTED"


@pytest.mark.parametrize(
    "change",
    [NO_NOTE, ("bool back = watch->through;", "bool back = false;")],
    ids=["no note", "no way back"],
)
def test_else_it_would_stay_moved(
    node: Stage, program: Program, monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
    change: tuple[str, str],
) -> None:  # fmt: skip
    """The mutants of put_back."""
    with node.mutated(tmp_path, change):
        for form in AT_THAT_MOMENT.values():
            if form.then != "127.0.1.2:7000":
                assert dial_in_between(node, program, monkeypatch, form)[1] != form.then


@pytest.mark.parametrize(
    "form", [*AT_THAT_MOMENT.values(), Form(VIP, *NOWHERE)], ids=[*AT_THAT_MOMENT, "nowhere"]
)
def test_so_it_would_if_nobody_looked(
    node: Stage, program: Program, monkeypatch: pytest.MonkeyPatch, form: Form
) -> None:
    monkeypatch.setattr(Mover, "_give_way", lambda *_: None)
    _, there = dial_in_between(node, program, monkeypatch, form)
    assert there in ("127.0.1.2:7000", "[::1]:7002")


def test_a_socket_with_a_port_of_its_own_that_is_disconnected_at_that_moment(
    node: Stage, program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The limit: no hook runs, and the socket has not lost its port."""
    program.do("own = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)")
    program.do("own.bind(('127.0.0.1', 7999))")
    program.do(f"own.connect(({VIP!r}, 53))")
    leave_one(node)
    with at_that_moment(node, monkeypatch, lambda: program.do(NOWHERE[0])):
        assert what(node.move(program.cookie)) == (Action.RESTEERED, Obstacle.NONE)
    assert node.peer(program.cookie) == "127.0.1.2:7000"


def test_where_no_hook_runs_any_more_nothing_is_put_back(
    node: Stage, program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    node.install(service("local", "127.0.1.4:7000/udp", backends=both(1)[:1]))
    cookie = program.dial("127.0.1.4", 7000)
    node.install(service("local", "127.0.1.4:7000/udp", backends=both(2)[:1]))
    bypass = node.bypassed()
    before_connect(monkeypatch, bypass.__enter__)
    try:
        assert what(node.move(cookie)) == (Action.SEVERED, Obstacle.NOT_BALANCED)
    finally:
        bypass.__exit__(None, None, None)
    assert fate(program) == "ECONNABORTED"


# --- without such help ----------------------------------------------------------------------------


HAMMER = f"""
def hammer(seconds, most):
    import random, time
    def pause(seconds):
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            pass
    def is_at(there):
        try:
            return own.getpeername() == there
        except OSError:
            return there is None
    def stays(there):
        # The mover needs a moment, too, until it has put the socket back.
        pause(0.0002)
        until = time.monotonic() + 5
        while not is_at(there):
            if time.monotonic() > until:
                return False
        return True
    nowhere, connect = struct.pack("=H14x", 0), ctypes.CDLL(None).connect
    end, rounds, lost = time.monotonic() + seconds, 0, 0
    while lost < most and (rounds < 100 or time.monotonic() < end):
        rounds += 1
        own.connect(({VIP!r}, 53))
        pause(random.random() * 0.0005)
        for there in (({OTHER!r}, 53), ("127.0.1.4", 7000)):
            own.connect(there)
            lost += not stays(there)
        own.connect(({VIP!r}, 53))
        pause(random.random() * 0.0005)
        connect(own.fileno(), nowhere, 16)
        lost += not stays(None)
    return rounds, lost
"""


def hammer(
    node: Stage, program: Program, seconds: float, *, most: int = 1000
) -> tuple[int, int, int]:
    """Move a socket while its program connects it as fast as it can, until *most* are lost.

    Return how often it was moved, how often the program went round, and how often it was not
    where it had just been connected to, or nowhere, and did not get there either.
    """
    node.install(at(1, *both(1, 2)), at(2, *both(3)))
    base = node.find(program.dial(VIP))
    (owner,) = node.resteerer.find_owners([base])[base.cookie]
    program.do(f"exec({HAMMER!r})")
    moved = 0
    with (
        ThreadPoolExecutor(1) as pool,
        SocketMemory(node.sandbox.pins) as memory,
        node.resteerer.mover() as mover,
        borrowed(owner.holder) as own,
        node.resteerer.watched([base.cookie]),
    ):
        rounds = pool.submit(program.do, f"hammer({seconds}, {most})")
        while not rounds.done():
            origin = memory.provenance(own)
            assert origin is not None
            target = base._replace(
                remote_address=origin.backend_address,
                remote_port=origin.backend_port,
                origin=origin,
            )
            if unpack_address(origin.frontend_address) == VIP:
                node.maps.watched.set(base.cookie, Watch())
                try:
                    mover.move(target, own, bound=False)
                    moved += 1
                except Kept as kept:
                    if kept.now:
                        node.engine.sever_sockets([kept.now])
        return moved, *rounds.result()


def test_a_program_is_where_it_has_just_connected_to(node: Stage, program: Program) -> None:
    seconds = float(os.environ.get("SOCKHOP_HAMMER", "3"))
    moved, rounds, lost = hammer(node, program, seconds)
    print(f"{moved:,} moves, {rounds:,} rounds, {lost} lost")
    assert moved > 10
    assert lost == 0


def test_else_it_would_sometimes_not_be(node: Stage, program: Program, tmp_path: Path) -> None:
    """The mutant."""
    with node.mutated(tmp_path, NO_NOTE):
        assert hammer(node, program, 60, most=1)[2] == 1


def test_what_a_killed_mover_has_left_is_removed(node: Stage, program: Program) -> None:
    cookie = program.dial(VIP)
    stale = Move(bytes(16), 1, program.process.pid, 0, 1)
    node.maps.moves.set(cookie, stale)
    node.maps.settings.set(Setting.MOVING, 1)
    with pytest.raises(OSError, match="canceled"):
        program.do(f"own.connect(({VIP!r}, 53))")
    with Resteerer(node.sandbox.pins):
        pass
    assert not node.maps.setting(Setting.MOVING)
    assert node.maps.moves.items() == []
    program.do(f"own.connect(({VIP!r}, 53))")
