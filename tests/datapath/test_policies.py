"""Policies decide where sockets may go: by their own cgroup and namespace, after balancing."""

import random
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from sockhop.agent.places import PlaceFinder
from sockhop.agent.policies import PolicyKeeper
from sockhop.agent.policy_installer import read_policies
from sockhop.agent.policy_table import Judge
from sockhop.datapath.policies import PolicySetting
from sockhop.errors import SystemLackError
from sockhop.kernel.cgroups import cgroup_id, cgroup_root
from sockhop.kernel.netns import current_cookie
from sockhop.model import (
    Clients,
    Desired,
    Policy,
    PolicyAction,
    Ports,
    Protocol,
    Rule,
    pack_address,
)
from tests.datapath.node import Node, service
from tests.datapath.rules import Policed, allow, deny, joined, rule, text, verdict
from tests.datapath.udp import connect_raw
from tests.sandbox import Sandbox, ServerThread

pytestmark = pytest.mark.kernel

KINDS = ("tcp", "udp", "sendto")
kinds = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture
def policed(node: Node) -> Iterator[Policed]:
    with Policed(node) as made:
        node.install()
        yield made


def denials(policed: Policed) -> dict[str, int]:
    return {each.name: each.denied for each in read_policies(policed.maps)}


# --- destinations ------------------------------------------------------------------------------


@kinds
def test_what_is_denied_gets_eperm(policed: Policed, kind: str) -> None:
    policed.apply(deny(rule("127.0.9.0/24", "127.0.9.7/32"), rule("fd00:9::/32", ports=(80, 81))))
    assert verdict("127.0.9.1", kind=kind)
    assert not verdict("127.0.9.7", kind=kind)
    assert not verdict("127.0.8.1", kind=kind)
    assert verdict("fd00:9::1", 81, kind=kind)
    assert not verdict("fd00:9::1", 82, kind=kind)
    assert denials(policed) == {"deny": 2}
    policed.apply()
    assert not verdict("127.0.9.1", kind=kind)


@kinds
def test_an_allowance_forbids_the_rest(policed: Policed, kind: str) -> None:
    policed.apply(allow(rule("127.0.9.0/24")), allow(rule("::1/128"), name="more"))
    assert not verdict("127.0.9.1", kind=kind)
    assert not verdict("::1", kind=kind)
    assert verdict("127.0.8.1", kind=kind)
    assert verdict("fd00:9::1", kind=kind)
    assert denials(policed) == {"allow": 2, "more": 0}


@pytest.mark.parametrize("kind", ["tcp", "udp"])
def test_a_mapped_address_is_an_ipv4_one(policed: Policed, kind: str) -> None:
    policed.apply(deny(rule("127.0.9.0/24")))
    assert verdict("::ffff:127.0.9.1", kind=kind)
    policed.apply(deny(rule("::/0")))
    assert not verdict("::ffff:127.0.9.1", kind=kind)
    assert verdict("::1", kind=kind)


@kinds
def test_protocols_are_told_apart(policed: Policed, kind: str) -> None:
    policed.apply(deny(rule("127.0.9.1/32", protocol=Protocol.TCP)))
    assert verdict("127.0.9.1", kind=kind) == (kind == "tcp")
    policed.apply(deny(rule("127.0.9.1/32", protocol=Protocol.UDP)))
    assert verdict("127.0.9.1", kind=kind) == (kind != "tcp")


def test_ping_is_neither(policed: Policed, node: Node) -> None:
    node.sandbox.run("sysctl", "-qw", "net.ipv4.ping_group_range=0 0")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM, socket.IPPROTO_ICMP) as client:
        policed.apply(deny(rule("127.0.9.1/32", ports=(1, 65535))))
        client.connect(("127.0.9.1", 0))
        policed.apply(deny(rule("127.0.9.1/32")))
        with pytest.raises(PermissionError):
            client.connect(("127.0.9.1", 0))


# --- who asks for the unspecified address gets a real one ----------------------------------------


@pytest.mark.parametrize(
    ("kind", "host", "reached"),
    [
        *((kind, *pair) for kind in KINDS for pair in (("0.0.0.0", "127.0.0.1"), ("::", "::1"))),
        # From an IPv6 socket's sendmsg the kernel has no way to IPv4.
        *((kind, "::ffff:0.0.0.0", "127.0.0.1") for kind in ("tcp", "udp")),
    ],
)
def test_the_unspecified_address_is_loopback(
    policed: Policed, kind: str, host: str, reached: str
) -> None:
    policed.apply(deny(rule(f"{reached}/{128 if ':' in reached else 32}")))
    assert verdict(host, kind=kind)
    policed.apply(deny(rule("0.0.0.0/32"), rule("::/128")))
    assert not verdict(host, kind=kind)


@pytest.mark.parametrize("kind", ["tcp", "sendto"])
def test_a_mutant_that_takes_it_literally(
    policed: Policed, node: Node, kind: str, tmp_path: Path
) -> None:
    with node.mutated(tmp_path / "m", ("to.address[3] = source ?: LOOPBACK4;", "")):
        policed.apply(deny(rule("127.0.0.1/32")))
        assert not verdict("0.0.0.0", kind=kind)


@kinds
def test_or_the_address_that_it_is_bound_to(policed: Policed, kind: str) -> None:
    type_ = socket.SOCK_STREAM if kind == "tcp" else socket.SOCK_DGRAM
    policed.apply(deny(rule("127.0.9.1/32")))
    for bound, denied in (("127.0.9.1", True), ("127.0.9.2", False)):
        with socket.socket(socket.AF_INET, type_) as client:
            client.bind((bound, 0))
            assert verdict("0.0.0.0", kind=kind, client=client) == denied


def test_an_address_in_control_data_counts(policed: Policed) -> None:
    """IP_PKTINFO chooses the source, and with it where the unspecified address is."""
    policed.apply(deny(rule("127.0.9.1/32")))
    info = struct.pack("=i4s4s", 0, socket.inet_aton("127.0.9.1"), bytes(4))
    control = [(socket.IPPROTO_IP, 8, info)]  # IP_PKTINFO
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client, pytest.raises(PermissionError):
        client.sendmsg([b"x"], control, 0, ("0.0.0.0", 9))


def test_a_connected_socket_may_send_with_a_ttl(policed: Policed) -> None:
    """The hook then has no address: connect() has been let through."""
    policed.apply(allow(rule("127.0.9.1/32")))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.connect(("127.0.9.1", 9))
        client.sendmsg([b"x"], [(socket.IPPROTO_IP, socket.IP_TTL, struct.pack("=i", 9))])
        with pytest.raises(PermissionError):
            client.sendto(b"x", ("127.0.9.2", 9))
        connect_raw(client, struct.pack("=H14x", socket.AF_UNSPEC))


# --- after balancing -----------------------------------------------------------------------------


def behind_a_service(policed: Policed, node: Node, kind: str) -> bool:
    """Whether the backend's address counts, and nobody is taken for connected who is not."""
    protocol = "tcp" if kind == "tcp" else "udp"
    node.install(service("s", f"10.9.0.1:53/{protocol}", backends=["127.0.9.1:9"]))
    policed.apply(deny(rule("127.0.9.1/32")))
    before = node.counters(f"10.9.0.1:53/{protocol}")
    by_backend = verdict("10.9.0.1", 53, kind=kind) and not node.live()
    counted = node.counters(f"10.9.0.1:53/{protocol}") != before and kind != "sendto"
    policed.apply(deny(rule("10.9.0.1/32")))
    by_frontend = verdict("10.9.0.1", 53, kind=kind)
    return by_backend and not counted and not by_frontend


@kinds
def test_the_backend_counts_not_the_frontend(policed: Policed, node: Node, kind: str) -> None:
    assert behind_a_service(policed, node, kind)


MUTANT_BEFORE_BALANCING = {
    "tcp": ("rewrite4(ctx, choice.slot.address, choice.slot.port);\n"
            "\t\tif (is_denied_connect4(ctx))\n\t\t\treturn REJECT;",
            "rewrite4(ctx, choice.slot.address, choice.slot.port);"),
    "sendto": ("rewrite4(ctx, choice.slot.address, choice.slot.port);\n\tdefault:\n"
               "\t\treturn is_denied_sendmsg4(ctx) ? REJECT : ALLOW;",
               "rewrite4(ctx, choice.slot.address, choice.slot.port);\n\t\treturn ALLOW;\n"
               "\tdefault:\n\t\treturn is_denied_sendmsg4(ctx) ? REJECT : ALLOW;"),
}  # fmt: skip


@pytest.mark.parametrize("kind", MUTANT_BEFORE_BALANCING)
def test_a_mutant_that_looks_before_balancing(
    policed: Policed, node: Node, kind: str, tmp_path: Path
) -> None:
    with node.mutated(tmp_path / "m", MUTANT_BEFORE_BALANCING[kind]):
        assert not behind_a_service(policed, node, kind)


def test_bypass_lets_everything_pass(policed: Policed, node: Node) -> None:
    policed.apply(deny(rule("127.0.9.1/32")))
    with node.bypassed():
        assert not any(verdict("127.0.9.1", kind=kind) for kind in KINDS)


# --- clients -------------------------------------------------------------------------------------


def by_its_own_cgroup(policed: Policed, kind: str) -> bool:
    """Whether it counts where a socket was made, not who uses it."""
    type_ = socket.SOCK_STREAM if kind == "tcp" else socket.SOCK_DGRAM
    with policed.group("a") as a, policed.group("b") as b:
        policed.apply(deny(rule("127.0.9.1/32"), clients=Clients(cgroups=(a,))))
        with joined(a):
            made_in_a = socket.socket(socket.AF_INET, type_)
        with joined(b), made_in_a:
            made_in_b = socket.socket(socket.AF_INET, type_)
            denied = verdict("127.0.9.1", kind=kind, client=made_in_a)
        with joined(a), made_in_b:
            return denied and not verdict("127.0.9.1", kind=kind, client=made_in_b)


@kinds
def test_the_cgroup_in_which_a_socket_was_made_counts(policed: Policed, kind: str) -> None:
    assert by_its_own_cgroup(policed, kind)


def test_a_mutant_that_asks_the_current_task(policed: Policed, node: Node, tmp_path: Path) -> None:
    change = (
        "client->cgroup = BPF_CORE_READ(ancestor, kn, id);",
        "client->cgroup = ((__u64(*)(void))80)(); /* bpf_get_current_cgroup_id */",
    )
    with node.mutated(tmp_path / "m", change):
        assert not by_its_own_cgroup(policed, "tcp")


def test_the_deepest_cgroup_decides(policed: Policed) -> None:
    with policed.group("a") as a, policed.group("a/b") as b, policed.group("a/b/c") as c:
        clients = Clients(cgroups=(a,), exclude=(b,))
        policed.apply(deny(rule("127.0.9.1/32"), clients=clients))
        assert not verdict("127.0.9.1")
        for group, denied in ((a, True), (b, False), (c, False)):
            with joined(group):
                assert verdict("127.0.9.1") == denied, group


def test_namespaces_are_told_apart(policed: Policed) -> None:
    everywhere = deny(rule("127.0.9.1/32"), name="everywhere")
    at_home = deny(rule("127.0.9.2/32"), name="home", clients=Clients("host"))
    with Sandbox() as other, policed.namespace(other.netns), joined_again(policed):
        there = deny(rule("127.0.9.3/32"), name="there", clients=Clients((str(other.netns),)))
        policed.apply(everywhere, at_home, there)
        assert [verdict(f"127.0.9.{i}") for i in (1, 2, 3)] == [True, False, True]
    assert [verdict(f"127.0.9.{i}") for i in (1, 2, 3)] == [True, True, False]


def joined_again(policed: Policed):  # type: ignore[no-untyped-def]
    """The other sandbox has taken us to its own cgroup, where nobody polices."""
    return joined(text(policed.cgroup))


# --- installing ----------------------------------------------------------------------------------


def test_random_policies_decide_as_their_table_says(policed: Policed) -> None:
    chance = random.Random(20261121)
    hosts = ["127.0.8.1", "127.0.9.1", "127.0.9.200", "127.1.0.1", "10.9.9.9", "fd00:9::1", "::1"]
    networks = ["0.0.0.0/0", "127.0.0.0/8", "127.0.0.0/16", "127.0.9.0/24", "127.0.9.128/25",
                "::/0", "fd00::/8", "::1/128"]  # fmt: skip

    def random_rule() -> Rule:
        first, last = sorted(chance.sample([7, 53, 80, 8080, 65535], 2))
        ports = (Ports(chance.choice([None, *Protocol]), first, last),)
        return Rule(chance.choice(networks), (), ports if chance.random() < 0.7 else ())

    with policed.group("a") as a, policed.group("a/b") as b:
        choices = [None, Clients(cgroups=(a,)), Clients(cgroups=(a,), exclude=(b,)), Clients((a,))]
        for _ in range(12):
            policies = [
                Policy(
                    f"p{i}",
                    chance.choice(list(PolicyAction)),
                    tuple(random_rule() for _ in range(chance.randint(0, 3))),
                    chance.choice(choices),
                )
                for i in range(chance.randint(1, 4))
            ]
            table = policed.table(*policies)
            policed.installer.apply(table, policies)
            for inside in ((), (a,), (b, a)):
                ids = [cgroup_id(cgroup_root() / path[1:]) for path in inside]
                with joined(inside[0] if inside else text(policed.cgroup)):
                    for host in hosts:
                        for kind in KINDS:
                            port = chance.choice([7, 8, 53, 54, 80, 8080, 65535])
                            number = Protocol("TCP" if kind == "tcp" else "UDP").number
                            said = Judge(table).decide(
                                current_cookie(), ids, pack_address(host), number, port
                            )
                            assert verdict(host, port, kind=kind) == said.denied, (policies, host)
    assert policed.maps.setting(PolicySetting.LOST) == 0


def test_counts_survive_a_change_and_a_restart(policed: Policed, node: Node) -> None:
    policy = deny(rule("127.0.9.1/32"))
    policed.apply(policy)
    verdict("127.0.9.1")
    assert policed.apply(policy, deny(rule("127.0.9.2/32"), name="other"))
    assert not policed.apply(policy, deny(rule("127.0.9.2/32"), name="other"))
    with Policed(node) as again:
        assert not again.apply(policy, deny(rule("127.0.9.2/32"), name="other"))
        assert denials(again) == {"deny": 1, "other": 0}
        again.apply()
        assert not denials(again)
        for left in (again.maps.clients, again.maps.networks, again.maps.ports):
            assert left.used() == 0


def test_what_has_no_room_changes_nothing(policed: Policed) -> None:
    policed.apply(deny(rule("127.0.9.1/32")))
    too_many = [rule(f"10.{i >> 8 & 255}.{i & 255}.{i >> 16}/32") for i in range(140_000)]
    with pytest.raises(SystemLackError, match="policy_networks has room for 131,072 entries"):
        policed.apply(deny(*too_many))
    assert verdict("127.0.9.1")


def test_a_server_may_answer_whom_it_could_not_dial(policed: Policed) -> None:
    """Policies speak of who connects: accepted connections are none of their business."""
    with ServerThread("s", "127.0.8.1") as server:
        policed.apply(deny(rule("127.0.9.1/32")))
        with socket.create_connection(
            (server.address, server.port), source_address=("127.0.9.1", 0)
        ) as client:
            assert client.recv(10) == b"s"


def test_what_a_killed_agent_has_left_is_no_policy(policed: Policed) -> None:
    """It died before it could store the word of a change: the next one wants none at all."""
    policed.apply(deny(rule("127.0.9.1/32")))
    policed.maps.settings.set(PolicySetting.CHECKSUM, 0)
    PolicyKeeper(policed.maps, policed.cgroup).apply(Desired(), policed.home, PlaceFinder())
    assert not verdict("127.0.9.1")
