"""Unconnected UDP: a backend for each socket and frontend, and answers that come from there."""

import errno
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sockhop.datapath.memory import SocketMemory
from sockhop.datapath.records import Total
from sockhop.model import Algorithm, Backend, BackendState, Service
from tests.datapath.node import Node, backend, service
from tests.datapath.udp import FORMS, RECEIVERS, Answer, Echoes, Request, both, connect_raw, udp

pytestmark = pytest.mark.kernel

forms = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
receivers = pytest.mark.parametrize("receive", RECEIVERS.values(), ids=RECEIVERS)


@pytest.fixture(scope="module")
def echoes(node: Node) -> Iterator[Echoes]:
    with Echoes(8) as made:
        yield made


@pytest.fixture(autouse=True)
def _fresh_services(node: Node) -> None:
    node.install()


def at(number: int, *backends: object, **fields: object) -> Service:
    """A service at the numbered address of both families."""
    frontends = (f"10.9.0.{number}:53/udp", f"[fd00:9::{number}]:53/udp")
    return service(f"s{number}", *frontends, backends=backends, **fields)


def given(*numbers: int, **fields: object) -> tuple[Backend, ...]:
    """Backends with more than their address."""
    return tuple(backend(text, **fields) for text in both(*numbers))


def counts(node: Node, form: str, number: int) -> tuple[int, int]:
    """connects and no_backend of the frontend that the form dials."""
    host = form.format(number).removeprefix("::ffff:")
    return node.counters(f"[{host}]:53/udp" if ":" in host else f"{host}:53/udp")


# --- there and back --------------------------------------------------------------------------


@forms
@receivers
def test_the_answer_comes_from_the_frontend(
    node: Node, echoes: Echoes, form: str, receive: Callable[[socket.socket], tuple[str, int]]
) -> None:
    node.install(at(1, *both(1, 2)))
    dialled = form.format(1), 53
    with udp(form) as client:
        assert echoes.answer(client, dialled) in (1, 2)
        assert receive(client) == dialled


@forms
@receivers
def test_so_it_does_on_a_connected_socket(
    node: Node, echoes: Echoes, form: str, receive: Callable[[socket.socket], tuple[str, int]]
) -> None:
    node.install(at(1, *both(1, 2)))
    dialled = form.format(1), 53
    with udp(form) as client:
        client.connect(dialled)
        client.send(b"who?")
        echoes.received().reply()
        assert receive(client) == dialled


@forms
def test_a_connected_socket_may_name_its_peer_again(node: Node, echoes: Echoes, form: str) -> None:
    """sendto() where send() would do: it goes to the backend whose answers the socket takes."""
    node.install(at(1, *both(1, 2, 3, 4)))
    dialled = form.format(1), 53
    for _ in range(10):
        with udp(form) as client:
            client.connect(dialled)
            client.send(b"who?")
            first = echoes.received().server
            assert client.sendto(b"who?", dialled)
            assert echoes.received().server == first


TTL = {
    socket.AF_INET: (socket.IPPROTO_IP, socket.IP_TTL),
    socket.AF_INET6: (socket.IPPROTO_IPV6, socket.IPV6_HOPLIMIT),
}


@forms
def test_a_connected_socket_may_send_with_a_ttl(node: Node, echoes: Echoes, form: str) -> None:
    """The kernel runs sendmsg hooks on that, with no address at all."""
    node.install(at(1, *both(1, 2)))
    dialled = form.format(1), 53
    with udp(form) as client:
        client.connect(dialled)
        client.sendmsg([b"who?"], [(*TTL[client.family], struct.pack("=i", 9))])
        echoes.received().reply()
        assert client.recvfrom(100)[1][:2] == dialled


# --- one after another -----------------------------------------------------------------------

# Long enough, some 3 microseconds, that two hooks which ran at once would lose counts.
DAWDLE = (
    "*used = ++peers->clock;",
    "*used = READ_ONCE(peers->clock) + 1;\n"
    "\t\tfor (int i = 0; i < 100; i++)\n\t\t\tbpf_ktime_get_boot_ns();\n"
    "\t\tpeers->clock = *used;",
)
THREADS, SENDS = 4, 2000


def used_by_threads(node: Node, form: str) -> int:
    """Send from one socket by several threads; return how often a hook has counted that."""
    with udp(form) as client, SocketMemory(node.sandbox.pins) as memory:

        def send() -> None:
            for _ in range(SENDS):
                client.sendto(b"to nobody", (form.format(1), 53))

        threads = [threading.Thread(target=send) for _ in range(THREADS)]
        for each in threads:
            each.start()
        for each in threads:
            each.join()
        (peer,) = memory.peers(client, 0)
        return peer.used


def test_threads_that_share_a_socket_take_turns(node: Node, tmp_path: Path) -> None:
    """The kernel has the socket locked while a hook of sendmsg() runs, so ours lock nothing."""
    node.install(at(1, *both(9)))
    with node.mutated(tmp_path, DAWDLE):
        counted = {form: used_by_threads(node, form) for form in FORMS.values()}
    assert counted == dict.fromkeys(FORMS.values(), THREADS * SENDS)


# --- one backend for a socket and a frontend ----------------------------------------------------


def spread(node: Node, echoes: Echoes, form: str) -> None:
    met = set()
    for _ in range(40):
        with udp(form) as client:
            servers = {echoes.ask(client, form.format(1)).server for _ in range(5)}
            assert len(servers) == 1
            met |= servers
    assert met == {1, 2}
    # A choice a socket, not a datagram.
    assert counts(node, form, 1) == (40, 0)


@forms
def test_sockets_spread_and_each_stays(node: Node, echoes: Echoes, form: str) -> None:
    node.install(at(1, *both(1, 2)))
    spread(node, echoes, form)


@forms
def test_it_stays_whatever_changes_around_it(node: Node, echoes: Echoes, form: str) -> None:
    dialled = form.format(1)
    node.install(at(1, *both(1, 2)))
    with udp(form) as client:
        first = echoes.ask(client, dialled)
        other = 3 - first.server
        for services in (
            [at(1, *both(1, 2, 3, 4))],
            [at(1, *given(other, weight=1000), *both(first.server))],
            [at(1, *both(1, 2), algorithm=Algorithm.MAGLEV)],
            [at(1, *both(other), *given(first.server, weight=0))],
            [at(1, *both(2, 1)), at(2, *both(3))],
        ):
            node.install(*services)
            assert [echoes.ask(client, dialled) for _ in range(5)] == [first] * 5


@forms
@pytest.mark.parametrize(
    "state",
    [None, BackendState.TERMINATING, BackendState.QUARANTINED, BackendState.MAINTENANCE],
    ids=lambda state: state or "removed",
)
def test_it_moves_when_its_backend_leaves(
    node: Node, echoes: Echoes, form: str, state: BackendState | None
) -> None:
    dialled = form.format(1)
    node.install(at(1, *both(1, 2, 3)))
    with udp(form) as client:
        first = echoes.ask(client, dialled).server
        leaves = given(first, state=state) if state else ()
        others = [n for n in (1, 2, 3) if n != first]
        node.install(at(1, *both(*others), *leaves))
        second = echoes.ask(client, dialled)
        assert second.server in others
        assert second.source == (dialled, 53)
        assert {echoes.ask(client, dialled) for _ in range(5)} == {second}
        # That the first is back is no reason to go.
        node.install(at(1, *both(1, 2, 3)))
        assert {echoes.ask(client, dialled) for _ in range(5)} == {second}


@forms
def test_it_stays_where_terminating_backends_serve(node: Node, echoes: Echoes, form: str) -> None:
    """Nothing is active: those that serve instead keep their sockets, too."""
    dialled = form.format(1)
    node.install(at(1, *both(1, 2, 3)))
    with udp(form) as client:
        first = echoes.ask(client, dialled)
        node.install(at(1, *given(1, 2, 3, state=BackendState.TERMINATING)))
        assert {echoes.ask(client, dialled) for _ in range(10)} == {first}
        with udp(form) as another:
            assert len({echoes.ask(another, dialled) for _ in range(10)}) == 1
        # The first active one has it.
        node.install(at(1, *given(1, 2, 3, state=BackendState.TERMINATING), *both(4)))
        assert {echoes.ask(client, dialled).server for _ in range(5)} == {4}


@forms
def test_a_frontend_that_goes_to_another_service_takes_its_sockets_along(
    node: Node, echoes: Echoes, form: str
) -> None:
    """The backend of before is active, but in the service that has lost the frontend."""
    mine, kept = at(1).frontends, at(2).frontends
    addresses = [str(frontend) for frontend in mine + kept]
    node.install(service("old", *addresses, backends=both(1)))
    with udp(form) as client:
        assert echoes.ask(client, form.format(1)).server == 1
        node.install(
            service("old", *addresses[2:], backends=both(1)),
            service("new", *addresses[:2], backends=both(2)),
        )
        assert echoes.ask(client, form.format(1)) == Answer(2, (form.format(1), 53))


@forms
def test_a_late_answer_still_comes_from_the_frontend(node: Node, echoes: Echoes, form: str) -> None:
    dialled = form.format(1), 53
    node.install(at(1, *both(1)))
    with udp(form) as client:
        client.sendto(b"who?", dialled)
        late = echoes.received()
        for following in (2, 3):
            node.install(at(1, *both(following)))
            assert echoes.ask(client, *dialled) == Answer(following, dialled)
        late.reply()
        assert client.recvfrom(100) == (b"1", client_view(client, dialled))


def client_view(client: socket.socket, address: tuple[str, int]) -> tuple[object, ...]:
    """A peer's address as recvfrom() of this socket has it."""
    return address if client.family is socket.AF_INET else (*address, 0, 0)


# --- one socket, many peers --------------------------------------------------------------------


@forms
def test_one_socket_talks_to_services_and_others_in_turn(
    node: Node, echoes: Echoes, form: str
) -> None:
    node.install(at(1, *both(1)), at(2, *both(2)))
    outside = {"10": "127.0.1.3", "fd": "::1", "::": "::ffff:127.0.1.3"}[form[:2]]
    port = 7003 if outside == "::1" else 7000
    with udp(form) as client:
        for _ in range(3):
            assert echoes.ask(client, form.format(1)) == Answer(1, (form.format(1), 53))
            assert echoes.ask(client, outside, port) == Answer(3, (outside, port))
            assert echoes.ask(client, form.format(2)) == Answer(2, (form.format(2), 53))
            # Another port of a frontend's address is no frontend.
            with pytest.raises(OSError, match="unreachable"):
                client.sendto(b"who?", (form.format(1), 54))


@pytest.fixture(scope="module")
def crowd(node: Node) -> Iterator[Echoes]:
    with Echoes(60, first=101) as made:
        yield made


@forms
def test_one_socket_talks_to_fifty_services(node: Node, crowd: Echoes, form: str) -> None:
    node.install(*(at(n, *both(n + 100)) for n in range(1, 51)))
    ambiguous = node.total(Total.AMBIGUOUS)
    late: list[Request] = []
    with udp(form) as client:
        for _ in range(3):
            late.clear()
            for n in range(1, 51):
                client.sendto(b"who?", (form.format(n), 53))
                late.append(crowd.received())
            # The answers come in another order.
            for request in late[::-1]:
                request.reply()
                source = client.recvfrom(100)[1][:2]
                assert source == (form.format(request.server - 100), 53)
        assert {counts(node, form, n) for n in range(1, 51)} == {(1, 0)}
        # One that is beyond the socket's own room moves, too.
        node.install(*(at(n, *both(n + 100 if n != 30 else 160)) for n in range(1, 51)))
        client.sendto(b"who?", (form.format(30), 53))
        assert crowd.received().server == 160
        late[29].reply()
        assert client.recvfrom(100)[1][:2] == (form.format(30), 53)
    assert node.total(Total.AMBIGUOUS) == ambiguous


@forms
def test_services_that_share_backends_get_different_ones(
    node: Node, echoes: Echoes, form: str
) -> None:
    """So that an answer's backend tells whose it is: 1 in 16 times chance fails to."""
    node.install(at(1, *both(1, 2)), at(2, *both(1, 2)))
    ambiguous = node.total(Total.AMBIGUOUS)
    same = 0
    for _ in range(160):
        with udp(form) as client:
            asked = [echoes.ask(client, form.format(n)) for n in (1, 2, 1, 2)]
            assert [answer.source[0] for answer in asked] == [form.format(n) for n in (1, 2, 1, 2)]
            same += asked[0].server == asked[1].server
    assert node.total(Total.AMBIGUOUS) - ambiguous == same
    # Four attempts; alone, it would be every second time. (P < 1e-6 beyond 32.)
    assert same <= 32
    # An attempt is no connect.
    assert counts(node, form, 2) == (160, 0)


@forms
@pytest.mark.parametrize("before", [0, 3, 6], ids="{}-peers-before".format)
def test_where_two_services_are_one_backend_the_latest_has_the_answer(
    node: Node, crowd: Echoes, form: str, before: int
) -> None:
    shared = both(150)
    others = [at(n, *both(n + 100)) for n in range(1, before + 1)]
    node.install(at(11, *shared), at(12, *shared), *others)
    ambiguous = node.total(Total.AMBIGUOUS)
    with udp(form) as client:
        for n in range(1, before + 1):
            crowd.ask(client, form.format(n))
        for n in (11, 12, 11, 12, 12, 11, 11):
            assert crowd.ask(client, form.format(n)) == Answer(150, (form.format(n), 53))
    assert node.total(Total.AMBIGUOUS) - ambiguous == 1


# --- refused, bypassed -------------------------------------------------------------------------


@forms
def test_no_backend_is_said_at_once(node: Node, echoes: Echoes, form: str) -> None:
    node.install(at(1), at(2, *both(1)))
    with udp(form) as client:
        for _ in range(3):
            with pytest.raises(OSError, match="No route to host") as raised:
                client.sendto(b"who?", (form.format(1), 53))
            assert raised.value.errno == errno.EHOSTUNREACH
        assert counts(node, form, 1) == (0, 3)
        # The socket is as good as before.
        assert echoes.ask(client, form.format(2)).server == 1
        # And one whose backends have gone is told, too.
        node.install(at(2))
        with pytest.raises(OSError, match="No route to host"):
            client.sendto(b"who?", (form.format(2), 53))
        node.install(at(2, *both(2)))
        assert echoes.ask(client, form.format(2)).server == 2


def test_from_ipv6_to_ipv4_backends_there_is_no_way(node: Node, echoes: Echoes) -> None:
    """connect() has one, through a mapped address; udpv6_sendmsg() has none."""
    node.install(service("s1", "[fd00:9::1]:53/udp", backends=both(1)[:1]))
    with udp("::") as client:
        for _ in range(3):
            with pytest.raises(OSError, match="No route to host"):
                client.sendto(b"who?", ("fd00:9::1", 53))
        assert counts(node, "fd00:9::{}", 1) == (0, 3)
        client.connect(("fd00:9::1", 53))
        client.send(b"who?")
        echoes.received().reply()
        assert client.recvfrom(100)[1][:2] == ("fd00:9::1", 53)


@forms
def test_bypass_leaves_datagrams_alone(node: Node, echoes: Echoes, form: str) -> None:
    node.install(at(1, *both(1)), at(2))
    real = {"10": "127.0.1.1", "fd": "::1", "::": "::ffff:127.0.1.1"}[form[:2]]
    with udp(form) as client:
        first = echoes.ask(client, form.format(1))
        client.sendto(b"who?", (form.format(1), 53))
        late = echoes.received()
        with node.bypassed():
            for n in (1, 2):
                with pytest.raises(OSError, match="unreachable") as raised:
                    client.sendto(b"who?", (form.format(n), 53))
                assert raised.value.errno == errno.ENETUNREACH
            late.reply()
            assert client.recvfrom(100)[1][0] == real
        assert counts(node, form, 2) == (0, 0)
        assert echoes.ask(client, form.format(1)) == first


# --- mutants -----------------------------------------------------------------------------------


def leave_and_name(node: Node, echoes: Echoes) -> int:
    """Send to the frontend from a socket that was connected to it; return who is asked."""
    node.install(at(1, *both(1)))
    with udp(FORMS["IPv4"]) as client:
        client.connect(("10.9.0.1", 53))
        connect_raw(client, struct.pack("=H14x", socket.AF_UNSPEC))
        node.install(at(1, *both(2)))
        return echoes.answer(client, ("10.9.0.1", 53))


def test_one_that_has_left_its_peer_is_given_another(node: Node, echoes: Echoes) -> None:
    assert leave_and_name(node, echoes) == 2


def test_mutant_that_does_not_look_at_the_peer(node: Node, echoes: Echoes, tmp_path: Path) -> None:
    look = "p->frontend_address, key->address) ||\n\t    !is_connected_to("
    with node.mutated(tmp_path, (look, look.replace("!is", "0 && !is"))):
        assert leave_and_name(node, echoes) == 1


def named_again(node: Node, echoes: Echoes, _: Echoes) -> None:
    test_a_connected_socket_may_name_its_peer_again(node, echoes, FORMS["IPv4"])


def late(node: Node, echoes: Echoes, _: Echoes) -> None:
    test_a_late_answer_still_comes_from_the_frontend(node, echoes, FORMS["IPv4"])


def latest(node: Node, _: Echoes, crowd: Echoes) -> None:
    test_where_two_services_are_one_backend_the_latest_has_the_answer(node, crowd, FORMS["IPv4"], 0)


def many(node: Node, _: Echoes, crowd: Echoes) -> None:
    test_one_socket_talks_to_fifty_services(node, crowd, FORMS["IPv4"])


def shared(node: Node, echoes: Echoes, _: Echoes) -> None:
    test_services_that_share_backends_get_different_ones(node, echoes, FORMS["IPv4"])


MUTANTS: dict[str, tuple[Callable[[Node, Echoes, Echoes], None], tuple[str, str]]] = {
    "asks others than its peer": (named_again, ("if (names_its_peer(", "if (0 && names_its_peer(")),
    "forgets who was asked": (late, ("lead_back(cookie, &before);", ";")),
    "takes the first for the latest": (latest, ("if (peer->used < latest ||", "if (latest ||")),
    "forgets those without room": (many, ("\tlead_back(cookie, peer);", ";")),
    "shares backends": (shared, ("if (choose_other(frontend, &other))", "if (0)")),
}


@pytest.mark.parametrize(("shows", "change"), MUTANTS.values(), ids=MUTANTS)
def test_mutant_that(
    node: Node,
    echoes: Echoes,
    crowd: Echoes,
    tmp_path: Path,
    shows: Callable[[Node, Echoes, Echoes], None],
    change: tuple[str, str],
) -> None:
    with node.mutated(tmp_path, change), pytest.raises(AssertionError):
        shows(node, echoes, crowd)
