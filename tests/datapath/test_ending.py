"""Exactly the sockets that are meant are ended: by backend, and by name."""

import socket
from collections.abc import Iterator

import pytest

from sockhop.agent.installed import read_services
from sockhop.datapath.ending import Action, Engine, EngineName, choose_engine
from sockhop.datapath.listing import Listing
from sockhop.datapath.sockets import Pair
from sockhop.kernel.netns import entered
from tests.datapath.kinds import SERVICES, Kinds, cookie, namespace, unique
from tests.datapath.node import Node

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
            "TCP in TIME-WAIT", "UDP that is not connected", "no process holds it"
        }  # fmt: skip


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
