"""Expressions mean what they mean to ss; what is wrong with one is said, and where."""

import contextlib
import re
import socket
import subprocess
from collections.abc import Iterator

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from sockhop.agent.expression import Subject, parse_expression
from sockhop.agent.predicates import states
from sockhop.datapath.listing import list_here
from sockhop.datapath.sockets import TCP_STATES, Socket
from sockhop.errors import InputError
from sockhop.kernel.netns import entered
from sockhop.model import endpoint, pack_address, unpack_address
from tests.datapath.kinds import namespace, unique

HOSTS = ("127.0.0.1", "127.0.1.7", "10.96.1.5", "10.96.1.6")
PORTS = (1000, 1001, 22, 8080)


def a_socket(**fields: object) -> Socket:
    nothing = dict.fromkeys(Socket._fields, 0) | {
        "local_address": pack_address("10.0.0.1"), "local_port": 1000, "remote_port": 443,
        "remote_address": pack_address("10.1.0.9"), "family": socket.AF_INET, "origin": None,
        "protocol": socket.IPPROTO_TCP, "state": 1, "cookie": 77,
    }  # fmt: skip
    return Socket(**nothing | fields)  # type: ignore[arg-type]


ONE = Subject(a_socket(), "shop/web:http", frozenset({42}))


@pytest.mark.unit
@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("", True),
        ("state established", True),
        ("state syn-sent", False),
        ("state syn-sent state established", True),
        ("state established and dport 443", True),
        ("state syn-sent and dport 443", False),
        ("state established and ( dport = :443 or dst 10.2.0.0/16 ) and not service = web", True),
        ("exclude established", False),
        ("state connected exclude established", False),
        ("dport 443", True),
        ("dport = :443", True),
        ("dport eq https", True),
        ("sport >= 1000 and sport le :1000", True),
        ("sport != 1000", False),
        ("dst 10.1.0.0/16", True),
        ("dst 10.1.0.9:443", True),
        ("dst 10.1.0.9:*", True),
        ("dst *:443", True),
        ("dst :443", True),
        ("dst != 10.1.0.9", False),
        ("dst inet:10.1.0.9", True),
        ("dst [::ffff:10.1.0.9]:443", True),
        ("dst ::/0", False),
        ("src 10.0.0.1 dst 10.1.0.9", True),
        ("src 10.0.0.2 or dst 10.1.0.9", True),
        # not before and before or
        ("dport 1 and dport 1 or dport 443", True),
        ("dport 443 or dport 1 and dport 1", True),
        ("not dport 1 dport 443", True),
        ("not (dport 1 or dport 443)", False),
        ("! dport = 443 | sport = 1000", True),
        ("not not dport 443", True),
        ("dport=443&&sport=1000", True),
        ("service = shop/web", True),
        ("service = shop/web:http", True),
        ('service = "shop/web"', True),
        ("service = shop", False),
        ("service != shop", True),
        ("pid = 42", True),
        ("pid = 4", False),
        ("cookie = 77 and protocol = tcp and unmanaged", True),
        ("protocol = UDP", False),
        ("backend = 10.1.0.9:443", False),
        ("netns = 0", True),
        ("( state established ) or dport 1", True),
    ],
)
def test_what_it_means(text: str, meant: bool) -> None:
    assert parse_expression(text).matches(ONE) is meant


@pytest.mark.unit
@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("dport", "it ends where what dport is compared with should follow"),
        ("dport = ", "it ends where"),
        ("dport = and", "'and' stands where a value of dport should"),
        ("dport = 65536", "65536 is no port"),
        ("dport = nosuchservice", "neither a port nor a name"),
        ("dst = example.org", "names are not looked up"),
        ("dst > 10.0.0.1", "dst is compared with = and != only"),
        ("dst inet6:10.0.0.1", "no address of the family inet6"),
        ("state open", "'open' is no state"),
        ("state established or dport 1", "a state holds for all that follows"),
        ("state established and", "it ends where a test should follow"),
        ("( dport = 1", "it ends where a closing bracket should follow"),
        ("dport = 1 )", "')' does not belong here"),
        ("fwmark = 1", "'fwmark' is no test"),
        ("pid = x", "'x' is no number"),
        ("protocol = sctp", "'sctp' is no protocol"),
        ("netns = /nowhere", "there is no such network namespace"),
        ("cgroup = /nowhere", "there is no such cgroup"),
        ("service = 'a", "this quotation mark has no other"),
        ("(" * 200, "more than 100 levels"),
        ("! " * 200, "more than 100 levels"),
    ],
)
def test_what_is_wrong(text: str, said: str) -> None:
    with pytest.raises(InputError) as error:
        parse_expression(text)
    assert said in str(error.value)


@pytest.mark.unit
@given(st.text(alphabet=st.sampled_from("()!=<>|& '\"dportsc1:./[]*"), max_size=40))
def test_no_text_breaks_it(text: str) -> None:
    with contextlib.suppress(InputError):
        parse_expression(text).matches(ONE)


# --- beside ss -----------------------------------------------------------------------------------

PORT_TESTS = st.builds(
    "{} {} :{}".format,
    st.sampled_from(["sport", "dport"]),
    st.sampled_from(["=", "!=", ">", "<", ">=", "<=", "eq", "ne", "gt", "lt", "ge", "le", "neq"]),
    st.sampled_from([*PORTS, 0, 65535]),
)
HOST_TESTS = st.builds(
    "{} {}{}{}".format,
    st.sampled_from(["src", "dst"]),
    st.sampled_from(["", "= "]),
    st.sampled_from(
        # Not 0.0.0.0/0: ss takes that for every address, and then looks at IPv4 sockets only.
        [*HOSTS, "127.0.0.0/8", "10.96.1.4/30", "*"],
    ),
    st.sampled_from(["", *(f":{port}" for port in PORTS)]),
)
EXPRESSIONS = st.recursive(
    PORT_TESTS | HOST_TESTS,
    lambda inner: (
        st.builds("( {} {} {} )".format, inner, st.sampled_from(["and", "or", "&", "|", ""]), inner)
        | st.builds("{} ( {} )".format, st.sampled_from(["not", "!"]), inner)
    ),
    max_leaves=6,
)
STATES = st.lists(
    st.builds(
        "{} {}".format,
        st.sampled_from(["state", "exclude"]),
        st.sampled_from(
            ["established", "listening", "closed", "connected", "synchronized", "all", "bucket",
             "big", "close-wait", "fin-wait-2"]
        ),
    ),
    max_size=2,
).map(" ".join)  # fmt: skip


@pytest.fixture(scope="module")
def varied() -> Iterator[None]:
    """Sockets with few addresses and ports in many combinations, in a namespace of their own."""
    with namespace(unique("ss")) as path, entered(path), contextlib.ExitStack() as stack:

        def new(host: str, port: int, kind: int) -> socket.socket:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            own = stack.enter_context(socket.socket(family, kind))
            own.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            own.bind((host, port))
            return own

        servers = {}
        for host in (*HOSTS, "::1", "fd00:96::1"):
            servers[host] = new(host, 8080, socket.SOCK_STREAM)
            servers[host].listen()
            new(host, 22, socket.SOCK_DGRAM).connect((host, 1000))
            new(host, 1001, socket.SOCK_DGRAM)
        for to in HOSTS:
            for host in HOSTS[:2]:
                new(host, 1000, socket.SOCK_STREAM).connect((to, 8080))
                accepted = stack.enter_context(servers[to].accept()[0])
                if to == "10.96.1.5":
                    accepted.shutdown(socket.SHUT_WR)
        new("fd00:96::1", 1001, socket.SOCK_STREAM).connect(("::1", 8080))
        new("::ffff:10.96.1.6", 1001, socket.SOCK_STREAM).connect(("::ffff:127.0.0.1", 8080))
        yield


def _of_ss(text: str) -> set[tuple[str, str, str, str]]:
    # ss has a state of its own notion where none is named; -a names them all.
    command = [
        "ss",
        "-Hntu",
        *([] if text.startswith(("state", "exclude")) else ["-a"]),
        *text.split(),
    ]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    found = set()
    for line in result.stdout.splitlines():
        fields = line.split()
        if fields[1] not in TCP_STATES:  # with one state in the filter ss leaves the column out
            fields.insert(1, "")
        found.add((fields[0], "", fields[4], fields[5]))
    return found


def _ss_end(address: bytes, port: int, family: int) -> str:
    text = endpoint(unpack_address(address), port)
    if family == socket.AF_INET6 and not text.startswith("["):
        host, _, _ = text.rpartition(":")
        text = f"[::ffff:{host}]:{port}"
    return re.sub(r":0$", ":*", text)


def _of_ours(text: str) -> set[tuple[str, str, str, str]]:
    matches = parse_expression(text).matches
    return {
        (
            "tcp" if each.protocol == socket.IPPROTO_TCP else "udp",
            "",
            _ss_end(each.local_address, each.local_port, each.family),
            _ss_end(each.remote_address, each.remote_port, each.family),
        )
        for each in list_here()
        if matches(Subject(each))
    }


@pytest.mark.kernel
@pytest.mark.usefixtures("varied")
@settings(max_examples=60, deadline=None)
@given(STATES, EXPRESSIONS)
def test_ss_says_the_same(series: str, expression: str) -> None:
    assume(any(parse_expression(series).matches(Subject(a_socket(state=n))) for n in range(1, 13)))
    text = f"{series} {expression}".strip()
    assert _of_ours(text) == _of_ss(text), text


@pytest.mark.kernel
@pytest.mark.usefixtures("varied")
@pytest.mark.parametrize(
    "text",
    [
        # By itself, since a test for an IPv6 address makes ss look at IPv6 sockets only.
        f"{name} {host}{port}"
        for name in ("src", "dst")
        for host in ("[fd00:96::1]", "[fd00::/16]", "[::1]", "[::/0]", "inet6:[::1]")
        for port in ("", ":1001", ":8080")
    ],
)
def test_ss_says_the_same_of_ipv6(text: str) -> None:
    assert _of_ours(text) == _of_ss(text)


@pytest.mark.unit
def test_a_state_is_one_bit_of_its_number() -> None:
    for number, name in enumerate(TCP_STATES, start=1):
        with contextlib.suppress(ValueError):
            assert states(name) == 1 << number
