"""What the tests of resteering share."""

import errno

from sockhop.datapath.ending import choose_engine
from sockhop.datapath.listing import Listing
from sockhop.datapath.outcome import Action
from sockhop.datapath.resteer import MoveOutcome, Obstacle, Resteerer
from sockhop.datapath.sockets import Socket, Sockets
from sockhop.model import Service, endpoint, unpack_address
from tests.datapath.node import Node, service
from tests.datapath.programs import Program
from tests.datapath.udp import Echoes, both

__all__ = ["MOVED", "OTHER", "VIP", "Stage", "ask", "at", "fate", "leave_one", "what"]

VIP, OTHER = "10.9.0.1", "10.9.0.2"
MOVED = (Action.RESTEERED, Obstacle.NONE)


class Stage(Node):
    """A node with what finds, moves and severs sockets."""

    def __enter__(self) -> "Stage":
        super().__enter__()
        pins = self.sandbox.pins
        try:
            self._listing = self._stack.enter_context(Listing(pins))
            self._sockets = self._stack.enter_context(Sockets(pins))
            self.engine = self._stack.enter_context(choose_engine(pins))
            self.resteerer = self._stack.enter_context(Resteerer(pins))
        except BaseException:
            self.__exit__()
            raise
        return self

    def find(self, cookie: int) -> Socket:
        """Return the socket with this cookie as it is now: here, or anywhere if it is balanced."""
        every = [*self._listing.here(), *self._sockets.remembered()]
        return next(each for each in every if each.cookie == cookie)

    def peer(self, cookie: int) -> str:
        """Return where a socket is really connected to."""
        now = self.find(cookie)
        return endpoint(unpack_address(now.remote_address), now.remote_port)

    def move(self, target: Socket | int, **options: bool) -> MoveOutcome:
        """Move a socket, given as it was or by its cookie, and else sever it."""
        target = target if isinstance(target, Socket) else self.find(target)
        before = self.resteerer.obstacles.copy()
        (outcome,) = self.resteerer.resteer([target], self.engine.sever_sockets, **options)
        assert self.resteerer.obstacles - before == {outcome.obstacle: 1}
        assert outcome.socket == target
        assert (outcome.obstacle is Obstacle.NONE) == (outcome.action is Action.RESTEERED)
        return outcome


def at(number: int, *backends: object, **fields: object) -> Service:
    """A service at the numbered address of both families."""
    frontends = (f"10.9.0.{number}:53/udp", f"[fd00:9::{number}]:53/udp")
    return service(f"s{number}", *frontends, backends=backends, **fields)


def leave_one(node: Stage) -> None:
    """Let the service at VIP have another backend than a socket that has just dialled it."""
    node.install(at(1, *both(2)), at(2, *both(3)))


def what(outcome: MoveOutcome) -> tuple[Action, Obstacle]:
    """Return what was done and what stood against it."""
    return outcome.action, outcome.obstacle


def ask(program: Program, echoes: Echoes) -> int:
    """Send and receive through the socket of *program*; return which server answered."""
    program.do("own.send(b'who?')")
    request = echoes.received()
    request.reply()
    data, source = program.receive()
    assert source == program.peer
    assert int(data) == request.server
    return request.server


def fate(program: Program) -> str:
    """Return the error that waits for the program, "" for none."""
    number = program.do("own.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)")
    return errno.errorcode[number] if number else ""
