"""What the tables of policies decide is what the policies say, one by one."""

import ipaddress
from pathlib import PurePosixPath

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sockhop.agent.policy_table import Judge, Place, compile_policies
from sockhop.model import Clients, Policy, PolicyAction, Ports, Protocol, Rule, pack_address

pytestmark = pytest.mark.unit

HOME, POD, OTHER = 1, 2, 3
SPACES = {"/ns/pod": POD}
CGROUPS = {
    path: Place(number, PurePosixPath(path))
    for number, path in enumerate(["/", "/a", "/a/b", "/a/b/c", "/d"], 100)
}
TCP, UDP, ICMP = Protocol.TCP.number, Protocol.UDP.number, 1

# Few addresses and ports, near the edges of few networks and ranges: they shall meet.
ADDRESSES = [
    "10.0.0.1",
    "10.0.1.1",
    "10.1.0.1",
    "11.0.0.1",
    "fd00::1",
    "fd00:1::1",
    "fe00::1",
    "::1",
]
NETWORKS = ["0.0.0.0/0", "10.0.0.0/8", "10.0.0.0/16", "10.0.0.0/24", "10.0.0.1/32",
            "::/0", "fd00::/16", "fd00::/32", "fd00::1/128", "::/64"]  # fmt: skip
EDGES = [1, 2, 79, 80, 81, 8000, 8999, 65534, 65535]


@st.composite
def rules(draw: st.DrawFn) -> Rule:
    cidr = draw(st.sampled_from(NETWORKS))
    outer = ipaddress.ip_network(cidr)
    inner = [
        text
        for text in NETWORKS
        if (found := ipaddress.ip_network(text)).version == outer.version and found.subnet_of(outer)  # type: ignore[arg-type]
    ]
    ports = st.builds(
        lambda protocol, edges: Ports(protocol, *sorted(edges)),
        st.sampled_from([None, *Protocol]),
        st.tuples(st.sampled_from(EDGES), st.sampled_from(EDGES)),
    )
    excluded = draw(st.lists(st.sampled_from(inner), max_size=2, unique=True))
    return Rule(cidr, tuple(excluded), tuple(draw(st.lists(ports, max_size=2))))


CLIENTS = st.none() | st.builds(
    Clients,
    st.sampled_from([None, "all", "host", ("/ns/pod",), ("/ns/gone",), ("/ns/gone", "/ns/pod")]),
    st.lists(st.sampled_from([*CGROUPS, "/gone"]), max_size=2, unique=True).map(tuple),
    st.lists(st.sampled_from([*CGROUPS, "/gone"]), max_size=1).map(tuple),
)
POLICIES = st.lists(
    st.builds(
        Policy,
        st.just("p"),
        st.sampled_from(PolicyAction),
        st.lists(rules(), max_size=3).map(tuple),
        CLIENTS,
        st.sampled_from([(), (), ("no",)]),
    ),
    max_size=4,
)


def is_for(policy: Policy, netns: int, cgroup: str) -> bool:
    clients = policy.clients or Clients()
    spaces = clients.namespaces
    if spaces == "host" and netns != HOME:
        return False
    if isinstance(spaces, tuple) and netns not in {SPACES.get(path) for path in spaces}:
        return False
    here = PurePosixPath(cgroup)
    for path in (str(each) for each in (here, *here.parents)):
        if path in clients.exclude and path in CGROUPS:
            return False
        if path in clients.cgroups and path in CGROUPS:
            return True
    return not clients.cgroups


def names(rule: Rule, address: str, protocol: int, port: int) -> bool:
    host = ipaddress.ip_address(address)
    if host not in ipaddress.ip_network(rule.cidr):
        return False
    if any(host in ipaddress.ip_network(text) for text in rule.excluded):
        return False
    return not rule.ports or any(
        ports.first <= port <= ports.last
        and protocol in ([ports.protocol.number] if ports.protocol else [TCP, UDP])
        for ports in rule.ports
    )


def denied(policies: list[Policy], netns: int, cgroup: str, to: tuple[str, int, int]) -> bool:
    """What the words of the documentation say."""
    mine = [each for each in policies if not each.refused and is_for(each, netns, cgroup)]
    named = {each.action for each in mine if any(names(rule, *to) for rule in each.rules)}
    if PolicyAction.DENY in named:
        return True
    return any(each.action is PolicyAction.ALLOW for each in mine) and not named


@settings(max_examples=150, deadline=None)
@given(
    POLICIES,
    st.sampled_from([HOME, POD, OTHER]),
    st.sampled_from(["/", "/a", "/a/b", "/a/b/c", "/a/b/c/d", "/d", "/e"]),
)
def test_the_tables_decide_as_the_policies_say(
    policies: list[Policy], netns: int, cgroup: str
) -> None:
    policies = [Policy(f"p{i}", *_rest(each)) for i, each in enumerate(policies)]
    table = compile_policies(policies, HOME, SPACES, CGROUPS)
    path = PurePosixPath(cgroup)
    ids = [CGROUPS[str(p)].id for p in (path, *path.parents) if str(p) in CGROUPS]
    for address in ADDRESSES:
        for protocol, ports in ((TCP, EDGES), (UDP, EDGES), (ICMP, [0])):
            for port in ports:
                verdict = Judge(table).decide(netns, ids, pack_address(address), protocol, port)
                wanted = denied(policies, netns, cgroup, (address, protocol, port))
                assert verdict.denied == wanted, (address, protocol, port)
                assert bool(verdict.policy) == wanted


def _rest(policy: Policy) -> tuple[PolicyAction, tuple[Rule, ...], Clients | None, tuple[str, ...]]:
    return policy.action, policy.rules, policy.clients, policy.refused


def test_a_range_takes_few_prefixes() -> None:
    rule = Rule("0.0.0.0/0", (), (Ports(Protocol.TCP, 1001, 64999),))
    table = compile_policies([Policy("p", PolicyAction.DENY, (rule,))], HOME, {}, {})
    assert max(map(len, table.classes)) < 40
    assert table.names() == {"p"}


def test_no_policy_is_no_table() -> None:
    assert not compile_policies([], HOME, {}, {})
    refused = Policy("p", PolicyAction.DENY, (Rule("::/0"),), None, ("ingress",))
    assert not compile_policies([refused], HOME, {}, {})
