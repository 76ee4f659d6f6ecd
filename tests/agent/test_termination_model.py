"""Random services, sockets, changes and intents, against a simple model, with both engines."""

import os
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from sockhop.agent.brake import Limits
from sockhop.agent.carry_out import Reach
from sockhop.agent.enforce import Enforcer
from sockhop.agent.events import EventLog
from sockhop.agent.forbidden import Looker
from sockhop.agent.installed import read_services
from sockhop.agent.orders import Orders
from sockhop.agent.policies import PolicyKeeper
from sockhop.agent.record import Recorder
from sockhop.agent.terminate import Terminator
from sockhop.datapath import sockets as sockets_module
from sockhop.datapath.end_by_iterator import IteratorMethod
from sockhop.datapath.ending import Engine, EngineName, Outcome, choose_engine
from sockhop.datapath.listing import Listing
from sockhop.datapath.resteer import Resteerer
from sockhop.datapath.sockets import Pair, Socket, Sockets
from sockhop.kernel.netns import entered
from sockhop.kernel.objects import object_path
from tests.agent.world import Servers, World, churn
from tests.datapath.kinds import namespace, unique
from tests.datapath.node import Node
from tests.mutants import mutant

pytestmark = pytest.mark.kernel

STEPS = int(os.environ.get("SOCKHOP_CHANGES", "40"))
MUTANT_STEPS = 150


@pytest.fixture(scope="module")
def node() -> Iterator[Node]:
    with Node() as made:
        yield made


@pytest.fixture(scope="module")
def spaces(node: Node) -> Iterator[list[Path]]:
    """Two network namespaces, with servers in both."""
    with namespace(unique("model")) as other:
        servers = [Servers()]
        try:
            with entered(other):
                servers.append(Servers())
            yield [node.sandbox.netns, other]
        finally:
            for each in servers:
                each.close()


@contextmanager
def world(
    node: Node, spaces: list[Path], directory: Path, engine: Engine, seed: int
) -> Iterator[World]:
    pins = node.sandbox.pins
    node.install()
    with ExitStack() as stack:
        resteerer = stack.enter_context(Resteerer(pins))
        sockets = stack.enter_context(Sockets(pins))

        def move(some: Sequence[Socket]) -> Sequence[Outcome]:
            return resteerer.resteer(some, engine.sever_sockets)

        reach = Reach(node.maps, sockets, engine, move, resteerer.obstacles)
        recorder = Recorder(EventLog(directory / "api.events"), lambda: read_services(node.maps))
        orders = Orders(directory / "api.orders", pins)
        limits = Limits(brake=False)
        looker = stack.enter_context(
            Looker(stack.enter_context(Listing(pins)), node.sandbox.cgroup)
        )
        enforcer = Enforcer(
            node.installer,
            PolicyKeeper(node.balancer.policies, node.sandbox.cgroup),
            looker,
            move,  # there are no redirects
            maps=node.maps,
            orders=orders,
        )
        terminator = Terminator(
            node.installer, orders, recorder, limits=limits, reach=reach, enforcer=enforcer
        )
        made = World(node, terminator, spaces, seed)
        stack.callback(made.close)
        yield made


def play(
    made: World, sockets: Sockets, steps: int, look: Callable[[], None] = lambda: None
) -> None:
    """Connect, change, compare, again and again."""
    made.change()
    for step in range(steps):
        for _ in range(made.chance.randrange(8)):
            made.connect()
        made.change()
        look()
        made.check(sockets)
        if step % 10 == 9:
            made.wait(0.2)
            made.check(sockets)


@pytest.mark.parametrize("name", ["iterator", "netlink"])
def test_exactly_the_right_sockets(
    node: Node, spaces: list[Path], tmp_path: Path, name: str
) -> None:
    seed = int(os.environ.get("SOCKHOP_SEED", random.SystemRandom().randrange(1 << 32)))
    print(f"SOCKHOP_SEED={seed}, {STEPS} changes, {name}")
    pins = node.sandbox.pins
    with (
        choose_engine(pins, EngineName(name)) as engine,
        world(node, spaces, tmp_path, engine, seed) as made,
        Sockets(pins) as sockets,
        churn(seed),
    ):
        play(made, sockets, STEPS)
        made.wait(1.5)
        made.check(sockets)
        print(made.counts)
        assert min(made.counts.values()) > 0


# --- each safety has a mutant without it, and the model notices -----------------------------------

NO_PEER_CHECK = (("if (is_at(now, p->backend_address, p->backend_port))\n", "if (1)\n"),)
NO_CONNECTEDNESS = (
    ("return now->state != TCP_CLOSE &&", "return now->state == TCP_CLOSE ||"),
    ("return now->inode && now->state == TCP_ESTABLISHED;", "return true;"),
)


def crippled(
    node: Node,
    directory: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    changes: tuple[tuple[str, str], ...],
) -> Engine:
    """An engine whose programs lack something: that of iterators, or the list for SOCK_DESTROY."""
    paths = {}
    for program in ("sever", "sockets"):
        (directory / program).mkdir()
        mine = changes if program == "sever" else changes[:1]  # the rest is not in that object
        paths[program] = mutant(directory / program, program, *mine)
    monkeypatch.setattr(sockets_module, "object_path", lambda n: paths.get(n) or object_path(n))
    if changes is NO_CONNECTEDNESS:
        monkeypatch.setattr(Socket, "reason_to_leave", "")
    if name == "iterator":
        return Engine(node.sandbox.pins, [IteratorMethod(node.sandbox.pins, path=paths["sever"])])
    return choose_engine(node.sandbox.pins, EngineName.NETLINK)


@pytest.mark.parametrize("name", ["iterator", "netlink"])
@pytest.mark.parametrize("changes", [NO_PEER_CHECK, NO_CONNECTEDNESS], ids=["peer", "connected"])
def test_without_a_check_others_end(
    node: Node,
    spaces: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    changes: tuple[tuple[str, str], ...],
) -> None:
    with (
        crippled(node, tmp_path, monkeypatch, name, changes) as engine,
        world(node, spaces, tmp_path, engine, 1) as made,
        Sockets(node.sandbox.pins) as sockets,
        pytest.raises(AssertionError, match="ECONNABORTED"),
    ):
        play(made, sockets, MUTANT_STEPS)


class Forgetful(Engine):
    """Takes a backend for the one that was at the same address earlier."""

    def __init__(self, node: Node) -> None:
        super().__init__(node.sandbox.pins, [IteratorMethod(node.sandbox.pins)])
        self._installer = node.installer
        self._seen: dict[Any, set[Pair]] = {}

    def sever_pairs(self, pairs: Any, **_: Any) -> list[Outcome]:
        return super().sever_pairs(
            set().union(*(same for same in self._seen.values() if same & set(pairs)), pairs)
        )

    def look(self) -> None:
        installed = self._installer.installed
        for member, found in installed.members.items():
            pair = Pair(installed.services[member.service], found.id)
            self._seen.setdefault(member, set()).add(pair)


def test_without_generations_others_end(node: Node, spaces: list[Path], tmp_path: Path) -> None:
    forgetful = Forgetful(node)
    with (
        forgetful as engine,
        world(node, spaces, tmp_path, engine, 1) as made,
        Sockets(node.sandbox.pins) as sockets,
        pytest.raises(AssertionError, match="ECONNABORTED"),
    ):
        play(made, sockets, MUTANT_STEPS, forgetful.look)
