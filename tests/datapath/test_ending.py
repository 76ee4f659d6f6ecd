"""Exactly the sockets that are meant are ended: by backend, and by name."""

import contextlib
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from sockhop.agent.installed import read_services
from sockhop.datapath.end_by_iterator import IteratorMethod
from sockhop.datapath.ending import Action, Engine, EngineName, choose_engine
from sockhop.datapath.listing import Listing
from sockhop.datapath.sockets import Pair, Socket
from sockhop.kernel.netns import entered
from tests.datapath.kinds import SERVICES, Kinds, cookie, fate, namespace, time_waits, unique
from tests.datapath.node import Node
from tests.mutants import mutant

pytestmark = pytest.mark.kernel


@pytest.fixture(params=["iterator", "netlink"])
def engine(node: Node, request: pytest.FixtureRequest) -> Iterator[Engine]:
    with choose_engine(node.sandbox.pins, EngineName(request.param)) as chosen:
        yield chosen


def pairs_of(node: Node, service: str) -> set[Pair]:
    names = read_services(node.maps)
    records = node.maps.backends.items()
    return {Pair(r.service, number) for number, r in records if names[r.service] == service}


def test_a_backend_takes_its_own_sockets_along_and_no_others(node: Node, engine: Engine) -> None:
    node.install(*SERVICES)
    with namespace(unique("other")) as other, Kinds() as here, entered(other), Kinds() as there:
        outcomes = engine.sever_pairs(pairs_of(node, "a"))
        here.check(ended=True, where="at home")
        there.check(ended=True, where="in another namespace")
        wanted = {cookie(own) for kinds in (here, there) for own in kinds.with_a.values()}
        assert {each.socket.cookie for each in outcomes} == wanted
        assert {each.action for each in outcomes} == {Action.SEVERED}
        assert not engine.sever_pairs(pairs_of(node, "a"))


def test_only_in_the_namespaces_that_are_given(node: Node, engine: Engine) -> None:
    node.install(*SERVICES)
    with namespace(unique("other")) as other, Kinds() as here, entered(other), Kinds() as there:
        engine.sever_pairs(pairs_of(node, "a"), namespaces=[node.home])
        here.check(ended=True)
        there.check(ended=False)


def test_a_backend_that_is_gone_from_the_maps(node: Node, engine: Engine) -> None:
    node.install(*SERVICES)
    doomed = pairs_of(node, "a")
    with Kinds() as kinds:
        node.install(*SERVICES[1:])
        engine.sever_pairs(doomed)
        kinds.check(ended=True)


def test_the_same_address_with_another_id(node: Node, engine: Engine) -> None:
    node.install(*SERVICES)
    before = pairs_of(node, "a")
    node.install(*SERVICES[1:])
    node.install(*SERVICES)
    assert not before & pairs_of(node, "a")
    with Kinds() as kinds:
        assert not engine.sever_pairs(before)
        kinds.check(ended=False)


def test_sockets_by_name(node: Node, engine: Engine) -> None:
    node.install(*SERVICES)
    with namespace(unique("other")) as other, Kinds() as here, entered(other), Kinds() as there:
        wanted = {cookie(own) for own in there.with_a.values()}
        with Listing(node.sandbox.pins) as listing:
            outcomes = engine.sever_sockets(s for s in listing.here() if s.cookie in wanted)
        here.check(ended=False)
        there.check(ended=True)
        assert {each.action for each in outcomes} == {Action.SEVERED}


def test_what_is_never_ended_even_by_name(node: Node, engine: Engine) -> None:
    node.install(*SERVICES)
    with Kinds() as kinds, Listing(node.sandbox.pins) as listing:
        others = [each for each in listing.here() if each.reason_to_leave]
        outcomes = engine.sever_sockets(others)
        kinds.check(ended=False)
        assert {each.action for each in outcomes} == {Action.LEFT}
        assert {each.reason for each in outcomes} == {
            "TCP in LISTEN",
            "TCP in TIME-WAIT",
            "TCP in SYN-RECV",
            "UDP that is not connected",
            "no process holds it",
        }


def test_a_socket_that_has_gone_elsewhere_since_it_was_listed(node: Node, engine: Engine) -> None:
    node.install(*SERVICES)
    with Kinds() as kinds, Listing(node.sandbox.pins) as listing:
        listed = [each for each in listing.here() if each.pair in pairs_of(node, "a")]
        listed = [each for each in listed if each.protocol == socket.IPPROTO_UDP]
        for name, own in kinds.with_a.items():
            if name == "udp4":
                own.connect(("10.96.1.99", 9))
            elif own.type == socket.SOCK_DGRAM:
                own.close()
        outcomes = engine.sever_sockets(listed)
        assert {each.action for each in outcomes} == {Action.GONE}
        assert kinds.with_a["udp4"].getpeername() == ("10.96.1.99", 9)


# --- each safety has a mutant without it, and the tests notice ------------------------------------

NO_PEER_CHECK = (
    "if (is_at(now, p->backend_address, p->backend_port))\n\t\treturn",
    "if (READ_ONCE(now->state))\n\t\treturn",
)
NO_PAIR_CHECK = ("if (bpf_map_lookup_elem(&pairs, &pair))", "if (READ_ONCE(pair.service))")
NO_ENDS_CHECK = (
    "return ends->local_port ==",
    "return READ_ONCE(now->state) || ends->local_port ==",
)
ANY_UDP = ("return now->inode && now->state == TCP_ESTABLISHED;", "return true;")
ANY_TCP = ("return now->inode && (STATE(now->state) & ENDABLE_TCP);", "return true;")


@contextlib.contextmanager
def without(node: Node, directory: Path, *changes: tuple[str, str]) -> Iterator[Engine]:
    pins, path = node.sandbox.pins, mutant(directory, "sever", *changes)
    with Engine(pins, [IteratorMethod(pins, path=path)]) as crippled:
        yield crippled


ROOM_FOR_TWO = tuple(
    f"__uint(max_entries, {size});\n\t__type(key, __u64);\n\t__type(value, struct socket_ends)"
    for size in (65536, 2)
)


def test_a_mutant_with_room_for_two_ends_all_the_same(node: Node, tmp_path: Path) -> None:
    node.install(*SERVICES)
    with without(node, tmp_path, (ROOM_FOR_TWO[0], ROOM_FOR_TWO[1])) as engine, Kinds() as kinds:
        wanted = {cookie(own) for own in kinds.with_a.values()}
        assert len(wanted) > 2
        with Listing(node.sandbox.pins) as listing:
            engine.sever_sockets(s for s in listing.here() if s.cookie in wanted)
        kinds.check(ended=True)


@pytest.mark.parametrize(
    ("changes", "victim"),
    [
        ((NO_PEER_CHECK,), "udp4 gone elsewhere"),
        ((NO_PEER_CHECK, ANY_UDP), "udp4 bound, disconnected"),
        ((NO_PAIR_CHECK,), "tcp4 with b"),
    ],
)
def test_a_mutant_that_ends_too_much(
    node: Node, tmp_path: Path, changes: tuple[tuple[str, str], ...], victim: str
) -> None:
    node.install(*SERVICES)
    with without(node, tmp_path, *changes) as crippled, Kinds() as kinds:
        crippled.sever_pairs(pairs_of(node, "a"))
        assert fate(kinds.spared[victim]) == "ECONNABORTED"
        with pytest.raises(AssertionError):
            kinds.check(ended=True)


def test_a_mutant_that_does_not_compare_the_ends(node: Node, tmp_path: Path) -> None:
    node.install(*SERVICES)
    with (
        without(node, tmp_path, NO_ENDS_CHECK) as crippled,
        Kinds() as kinds,
        Listing(node.sandbox.pins) as listing,
    ):
        own = kinds.with_a["udp4"]
        listed = [each for each in listing.here() if each.cookie == cookie(own)]
        own.connect(("10.96.1.99", 9))
        crippled.sever_sockets(listed)
        assert fate(own) == "ECONNABORTED"


def test_mutants_without_a_guard_of_kinds(
    node: Node, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There are two: what is asked of the kernel, and what the iterator takes."""
    node.install(*SERVICES)
    pins = node.sandbox.pins
    monkeypatch.setattr(Socket, "reason_to_leave", "")
    never = {"LISTEN", "UNCONN", "TIME-WAIT"}

    def end_all(engine: Engine) -> None:
        with Listing(pins) as listing:
            engine.sever_sockets(each for each in listing.here() if each.state_name in never)

    with choose_engine(pins, EngineName.ITERATOR) as guarded, Kinds() as kinds:
        end_all(guarded)
        kinds.check(ended=False)
    with without(node, tmp_path, ANY_UDP, ANY_TCP) as crippled, Kinds() as kinds:
        end_all(crippled)
        assert fate(kinds.spared["udp4 unconnected"]) == "ECONNABORTED"
        assert fate(kinds.spared["tcp4 listens"]) == "ECONNABORTED"
    with choose_engine(pins, EngineName.NETLINK) as unguarded, Kinds() as kinds:
        end_all(unguarded)
        assert fate(kinds.spared["udp4 unconnected"]) == "ECONNABORTED"
        assert not time_waits() & {kinds.time_wait}


def test_a_half_open_connection_is_the_kernels(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    node.install(*SERVICES)
    pins = node.sandbox.pins
    with choose_engine(pins, EngineName.NETLINK) as engine, Listing(pins) as listing:
        with Kinds() as kinds:
            half_open = [each for each in listing.here() if each.state_name == "SYN-RECV"]
            assert half_open
            engine.sever_sockets(half_open)
            kinds.check(ended=False)
        monkeypatch.setattr(Socket, "reason_to_leave", "")
        with Kinds() as kinds:
            engine.sever_sockets(each for each in listing.here() if each.state_name == "SYN-RECV")
            with pytest.raises(OSError, match="timed out|reset"):
                kinds.check(ended=False)
