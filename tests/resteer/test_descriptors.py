"""Who has a socket that is to be moved, and whether the kernel hands it out."""

import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable

import pytest

from sockhop.datapath import moving
from sockhop.datapath.outcome import Action
from sockhop.datapath.owners import Owner, Owners
from sockhop.datapath.resteer import Obstacle, Resteerer
from sockhop.datapath.sockets import Sockets
from tests.datapath.kinds import namespace
from tests.datapath.node import service
from tests.datapath.programs import Program
from tests.datapath.udp import Echoes
from tests.resteer.stage import MOVED, VIP, Stage, ask, fate, leave_one, what

pytestmark = pytest.mark.kernel


# --- its descriptor -------------------------------------------------------------------------------


def after_the_search(monkeypatch: pytest.MonkeyPatch, action: Callable[[], object]) -> None:
    """Do something, once, when the socket's owners have been found."""
    real = Owners.find
    actions = [action]

    def find_owners(self: Owners, cookies: Iterable[int]) -> dict[int, list[Owner]]:
        found = real(self, cookies)
        if actions:
            actions.pop()()
        return found

    monkeypatch.setattr(Owners, "find", find_owners)


@pytest.mark.parametrize("ends", ["own.close()", ""], ids=["closed", "exited"])
def test_a_socket_that_is_closed_meanwhile_is_gone(
    node: Stage, program: Program, monkeypatch: pytest.MonkeyPatch, ends: str
) -> None:
    cookie = program.dial(VIP)
    leave_one(node)
    after_the_search(monkeypatch, (lambda: program.do(ends)) if ends else program.close)
    assert what(node.move(cookie)) == (Action.GONE, Obstacle.CLOSED)


def reuse_descriptor(node: Stage, program: Program, monkeypatch: pytest.MonkeyPatch) -> str:
    """Put another socket in the place of one that is to be moved; return where that then is."""
    node.install()
    cookie = program.dial("127.0.1.1", 7000)
    node.install(service("redirect", "127.0.1.1:7000/udp", backends=["127.0.1.2:7000"]))
    program.do("other = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)")
    program.do("other.connect(('127.0.1.4', 7000))")
    reuse = "os.dup2(other.fileno(), own.fileno())"
    after_the_search(monkeypatch, lambda: program.do(reuse))
    node.move(cookie)
    return node.peer(program.cookie)


def test_another_socket_in_its_place_is_not_touched(
    node: Stage, program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert reuse_descriptor(node, program, monkeypatch) == "127.0.1.4:7000"


def test_else_it_would_be(node: Stage, program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mutant without a look at the cookie."""
    monkeypatch.setattr(moving, "_is_same", lambda *_: True)
    assert reuse_descriptor(node, program, monkeypatch) == "127.0.1.2:7000"


def inherit(program: Program) -> int:
    """Let a child of the program have the socket, too."""
    program.do("own.set_inheritable(True)")
    return int(program.do("os.posix_spawn('/bin/sleep', ['sleep', '60'], os.environ)"))


def test_without_the_iterator_proc_tells_who_has_it(
    node: Stage, program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before Linux 5.11."""
    cookie = program.dial(VIP)
    leave_one(node)
    monkeypatch.setattr(node.resteerer, "_owners", None)
    assert what(node.move(cookie)) == MOVED
    assert node.peer(cookie) == "127.0.1.2:7000"


def test_a_shared_socket_is_moved_for_all(node: Stage, echoes: Echoes, program: Program) -> None:
    cookie = program.dial(VIP)
    child = inherit(program)
    leave_one(node)
    assert what(node.move(cookie)) == MOVED
    assert ask(program, echoes) == 2
    program.do(f"os.kill({child}, 9)")


def test_through_whoever_still_has_it(
    node: Stage, program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    cookie = program.dial(VIP)
    child = inherit(program)
    leave_one(node)
    after_the_search(monkeypatch, program.close)
    try:
        assert what(node.move(cookie)) == MOVED
        assert node.peer(cookie) == "127.0.1.2:7000"
    finally:
        subprocess.run(["kill", "-9", str(child)], check=True)


HAND_OVER = (
    "ends = socket.socketpair()",
    "socket.send_fds(ends[0], [b'x'], [own.fileno()])",
    "own.close()",
)
TAKE = "own = socket.socket(fileno=socket.recv_fds(ends[1], 1, 1)[1][0])"
# io_uring_setup(2), io_uring_register(2) with IORING_REGISTER_FILES; then only the ring has it.
HIDE_IN_A_RING = (
    "call = ctypes.CDLL(None, use_errno=True).syscall",
    "ring = call(425, 1, ctypes.create_string_buffer(120))",
    "files = (ctypes.c_int * 1)(own.fileno())",
    "registered = call(427, ring, 2, files, 1)",
    "own.close()",
)


@pytest.mark.parametrize("lines", [HAND_OVER, HIDE_IN_A_RING], ids=["on its way", "io_uring"])
def test_a_socket_without_a_descriptor_is_severed(
    node: Stage, program: Program, lines: tuple[str, ...]
) -> None:
    cookie = program.dial(VIP)
    for line in lines:
        program.do(line)
    leave_one(node)
    assert node.peer(cookie) == "127.0.1.1:7000"
    assert what(node.move(cookie)) == (Action.SEVERED, Obstacle.NO_DESCRIPTOR)
    assert node.peer(cookie) == "0.0.0.0:0"


def test_but_not_one_that_arrives(
    node: Stage, echoes: Echoes, program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    cookie = program.dial(VIP)
    for line in HAND_OVER:
        program.do(line)
    leave_one(node)
    after_the_search(monkeypatch, lambda: program.do(TAKE))
    assert what(node.move(cookie)) == MOVED
    program.do("own.settimeout(5)")
    assert ask(program, echoes) == 2


UNSHARED = (
    "import threading, time",
    "made = []",
    "unshare = ctypes.CDLL(None).unshare",
    "make = lambda: made.append(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))",
    f"dial = lambda: made[0].connect(({VIP!r}, 53))",
    "tell = lambda: made.append(made[0].getsockopt(socket.SOL_SOCKET, 57, 8))",
    "run = lambda: (unshare(0x400), make(), dial(), tell(), time.sleep(60))",
    "threading.Thread(target=run, daemon=True).start()",
)


def test_a_thread_may_have_descriptors_of_its_own(node: Stage, program: Program) -> None:
    """Needs PIDFD_THREAD (Linux 6.9)."""
    for line in UNSHARED:
        program.do(line)
    while program.do("len(made)") < 2:
        pass
    cookie = int.from_bytes(program.do("made[1]"), "little")
    leave_one(node)
    assert what(node.move(cookie)) == MOVED
    assert node.peer(cookie) == "127.0.1.2:7000"


NO_PTRACE = ("setpriv", "--bounding-set=-sys_ptrace", "--inh-caps=-sys_ptrace")
REFUSALS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "without CAP_SYS_PTRACE": (NO_PTRACE, ()),
    "seccomp": ((), ("seccomp",)),
}


@pytest.mark.parametrize(("wrapper", "options"), REFUSALS.values(), ids=REFUSALS)
def test_a_socket_that_the_kernel_does_not_hand_out_is_severed(
    node: Stage, program: Program, wrapper: tuple[str, ...], options: tuple[str, ...]
) -> None:
    cookie = program.dial(VIP)
    leave_one(node)
    result = subprocess.run(
        [*wrapper, sys.executable, "-m", "tests.datapath.outsider", node.sandbox.pins,
         str(cookie), *options],
        capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    action, obstacle, reason = result.stdout.strip().split("|")
    assert (action, obstacle) == (Action.SEVERED, Obstacle.REFUSED)
    assert f"python/{program.process.pid} may not be asked: duplicating descriptor" in reason
    assert reason.endswith("Operation not permitted (EPERM)")
    assert fate(program) == "ECONNABORTED"


# --- elsewhere on the node ------------------------------------------------------------------------


def test_a_socket_in_another_namespace_is_moved(node: Stage) -> None:
    there = service("far", "10.9.0.3:53/udp", backends=["10.96.1.5:7000"])
    node.install(there)
    with (
        namespace(f"{node.sandbox.name}-far") as path,
        Program("nsenter", f"--net={path}") as program,
    ):
        cookie = program.dial("10.9.0.3")
        node.install(service("far", "10.9.0.3:53/udp", backends=["10.96.1.6:7000"]))
        assert what(node.move(cookie)) == MOVED
        assert node.peer(cookie) == "10.96.1.6:7000"
        # A loopback backend is none there.
        node.install(service("far", "10.9.0.3:53/udp", backends=["127.0.1.1:7000"]))
        assert what(node.move(cookie)) == (Action.LEFT, Obstacle.NO_BACKEND)


def test_a_thousand_sockets_are_moved_at_once(node: Stage, program: Program) -> None:
    program.do("make = lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM)")
    program.do("many = [make() for _ in range(1000)]")
    program.do(f"[each.connect(({VIP!r}, 53)) for each in many]")
    leave_one(node)
    with Sockets(node.sandbox.pins) as sockets, Resteerer(node.sandbox.pins) as resteerer:
        targets = [each for each in sockets.balanced() if each.protocol == 17]
        begin = time.monotonic()
        outcomes = resteerer.resteer(targets, None)
        seconds = time.monotonic() - begin
        assert Counter(each.action for each in outcomes) == {Action.RESTEERED: 1000}
        assert resteerer.obstacles == {Obstacle.NONE: 1000}
        assert seconds < 5
    assert node.live()["127.0.1.2", 7000] == 1000
