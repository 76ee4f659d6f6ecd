"""What an expression may ask of a socket: the predicates of ss(8), and those of our own."""

import ipaddress
import operator
import socket
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, TypeAlias

from sockhop.agent.target import split_service_port
from sockhop.datapath.sockets import TCP_STATES, Socket
from sockhop.kernel import netns
from sockhop.kernel.cgroups import cgroup_root, groups_below
from sockhop.model import pack_address

__all__ = ["FLAGS", "NAMES", "Predicate", "Subject", "predicate", "states"]


class Subject(NamedTuple):
    """A socket, the service port that it is with ("" for none), and who holds it, if asked for."""

    socket: Socket
    service: str = ""
    pids: frozenset[int] = frozenset()


Predicate: TypeAlias = Callable[[Subject], bool]

_NAMED_STATES = {
    name: 1 << number
    for number, names in enumerate(
        (
            ("established", "estab"),
            ("syn-sent",),
            ("syn-recv", "syn-rcv"),
            ("fin-wait-1",),
            ("fin-wait-2",),
            ("time-wait",),
            ("closed", "close", "unconnected", "unconn"),
            ("close-wait",),
            ("last-ack",),
            ("listening", "listen"),
            ("closing",),
            ("new-syn-recv",),
        ),
        start=1,
    )
    for name in names
}
_ALL = sum(1 << number + 1 for number in range(len(TCP_STATES)))
_CONNECTED = _ALL & ~_NAMED_STATES["closed"] & ~_NAMED_STATES["listening"]
_BUCKET = _NAMED_STATES["syn-recv"] | _NAMED_STATES["time-wait"] | _NAMED_STATES["new-syn-recv"]
_STATES = _NAMED_STATES | {
    "all": _ALL,
    "connected": _CONNECTED,
    "synchronized": _CONNECTED & ~_NAMED_STATES["syn-sent"],
    "bucket": _BUCKET,
    "big": _ALL & ~_BUCKET,
}

_COMPARE: dict[str, Callable[[int, int], bool]] = {
    "=": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
_PROTOCOLS = {"tcp": socket.IPPROTO_TCP, "udp": socket.IPPROTO_UDP, "raw": socket.IPPROTO_RAW}
_ANY_IPV4 = int.from_bytes(pack_address("0.0.0.0"), "big")
_RUN_NETNS = Path("/run/netns")


def states(name: str) -> int:
    """Return the states that ss knows as *name*, one bit each; ValueError for any other."""
    found = _STATES.get(name.lower())
    if found is None:
        raise ValueError(f"{name!r} is no state: there are {', '.join(_STATES)}")
    return found


def predicate(name: str, comparison: str, value: str) -> Predicate:
    """Return the test *name*, one of NAMES, of a value; ValueError says what is wrong."""
    if name in ("sport", "dport"):
        return _port(name, comparison, value)
    if comparison not in ("=", "!="):
        raise ValueError(f"{name} is compared with = and != only")
    test = _TESTS[name](value)
    if comparison == "=":
        return test
    return lambda subject: not test(subject)


# --- of ss ---------------------------------------------------------------------------------------


def _port(name: str, comparison: str, value: str) -> Predicate:
    compare, wanted = _COMPARE[comparison], _port_number(value.removeprefix(":"))
    if name == "sport":
        return lambda subject: compare(subject.socket.local_port, wanted)
    return lambda subject: compare(subject.socket.remote_port, wanted)


def _port_number(text: str) -> int:
    try:
        number = int(text) if text.isdecimal() else socket.getservbyname(text)
    except OSError:
        raise ValueError(f"{text!r} is neither a port nor a name in /etc/services") from None
    if number > 65535:
        raise ValueError(f"{text} is no port: they go up to 65535")
    return number


class _Host(NamedTuple):
    """The first `bits` of an address, in an address family or (0) any; a port or None for any."""

    family: int
    address: int
    bits: int
    port: int | None

    def is_at(self, family: int, address: bytes, port: int) -> bool:
        if self.port is not None and port != self.port:
            return False
        if self.family == socket.AF_INET6 and family != socket.AF_INET6:
            return False
        shift = 128 - self.bits
        return int.from_bytes(address, "big") >> shift == self.address >> shift


def _host(text: str) -> _Host:
    """Return the meaning of [FAMILY:]ADDRESS[/PREFIX][:PORT]; `*` stands for any of either."""
    rest, wanted = text, 0
    for name, family in (("inet:", socket.AF_INET), ("inet6:", socket.AF_INET6)):
        if text.startswith(name):
            rest, wanted = text[len(name) :], family
    host, port = _split(rest)
    number = None if port in ("", "*") else _port_number(port)
    if host in ("", "*"):
        return (
            _Host(wanted, _ANY_IPV4, 96, number)
            if wanted == socket.AF_INET
            else _Host(wanted, 0, 0, number)
        )
    try:
        network = ipaddress.ip_network(host.replace("[", "").replace("]", ""), strict=False)
    except ValueError:
        raise ValueError(f"{host!r} is no address and no prefix; names are not looked up") from None
    if wanted and (wanted == socket.AF_INET) != (network.version == 4):
        raise ValueError(f"{host} is no address of the family {text.partition(':')[0]}")
    address = int.from_bytes(pack_address(str(network.network_address)), "big")
    if network.version == 4:
        return _Host(socket.AF_INET, address, 96 + network.prefixlen, number)
    if network.prefixlen >= 96 and address >> 32 == _ANY_IPV4 >> 32:
        return _Host(socket.AF_INET, address, network.prefixlen, number)
    return _Host(socket.AF_INET6, address, network.prefixlen, number)


def _split(text: str) -> tuple[str, str]:
    """Part an address from its port: an IPv6 one without brackets has none."""
    if text.startswith("["):
        host, bracket, rest = text.partition("]")
        prefix, _, port = rest.partition(":")
        return host + bracket + prefix, port
    if text.count(":") > 1:
        return text, ""
    host, _, port = text.partition(":")
    return host, port


def _src(value: str) -> Predicate:
    host = _host(value)
    return lambda subject: host.is_at(
        subject.socket.family, subject.socket.local_address, subject.socket.local_port
    )


def _dst(value: str) -> Predicate:
    host = _host(value)
    return lambda subject: host.is_at(
        subject.socket.family, subject.socket.remote_address, subject.socket.remote_port
    )


def _cgroup(value: str) -> Predicate:
    """In a cgroup or below it, where the socket was made; a path from the cgroup2 root or /sys."""
    root = cgroup_root()
    path = Path(value) if value.startswith(f"{root}/") else root / value.lstrip("/")
    if not path.is_dir():
        raise ValueError(f"{path}: there is no such cgroup")
    wanted = {group.stat().st_ino for group, _ in groups_below(path)}
    return lambda subject: subject.socket.cgroup in wanted


def _state(value: str) -> Predicate:
    wanted = states(value)
    return lambda subject: bool(wanted >> subject.socket.state & 1)


# --- of our own ----------------------------------------------------------------------------------


def _service(value: str) -> Predicate:
    """By its name, or by that of one of its ports: namespace/name:port."""
    return lambda subject: (
        bool(subject.service) and value in (subject.service, split_service_port(subject.service)[0])
    )


def _backend(value: str) -> Predicate:
    """Those that were balanced to it, and still are there."""
    host = _host(value)
    return lambda subject: (
        subject.socket.pair is not None
        and host.is_at(
            subject.socket.family, subject.socket.remote_address, subject.socket.remote_port
        )
    )


def _netns(value: str) -> Predicate:
    """By the inode that lsns shows, the name that `ip netns` shows, or a path."""
    if value.isdecimal():
        wanted = int(value)
    else:
        path = Path(value) if value.startswith("/") else _RUN_NETNS / value
        try:
            wanted = netns.inode(path)
        except OSError:
            raise ValueError(f"{path}: there is no such network namespace") from None
    return lambda subject: subject.socket.netns == wanted


def _number(value: str) -> int:
    if not value.isdecimal():
        raise ValueError(f"{value!r} is no number")
    return int(value)


def _pid(value: str) -> Predicate:
    wanted = _number(value)
    return lambda subject: wanted in subject.pids


def _cookie(value: str) -> Predicate:
    wanted = _number(value)
    return lambda subject: subject.socket.cookie == wanted


def _protocol(value: str) -> Predicate:
    wanted = _PROTOCOLS.get(value.lower())
    if wanted is None:
        raise ValueError(f"{value!r} is no protocol: there are {', '.join(_PROTOCOLS)}")
    return lambda subject: subject.socket.protocol == wanted


def _unmanaged(_: str) -> Predicate:
    return lambda subject: subject.socket.origin is None


_TESTS: dict[str, Callable[[str], Predicate]] = {
    "state": _state,
    "src": _src,
    "dst": _dst,
    "service": _service,
    "backend": _backend,
    "netns": _netns,
    "pid": _pid,
    "cgroup": _cgroup,
    "protocol": _protocol,
    "cookie": _cookie,
    "unmanaged": _unmanaged,
}
NAMES = (*_TESTS, "sport", "dport")
"""The names of all tests."""
FLAGS = frozenset({"unmanaged"})
"""Those that take no value."""
