"""The sentences of `doctor`: for what was seen, the cause, what shows it and what to do."""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from sockhop.datapath.sockets import TCP_STATES, Socket
from sockhop.diagnose.causes import Cause
from sockhop.diagnose.dial import Result
from sockhop.diagnose.pairs import HalfSpliced
from sockhop.kernel.namespaces import Namespace
from sockhop.kernel.procfs import find_holders

__all__ = [
    "AT_ONCE",
    "LISTEN",
    "MTU",
    "NOT_BALANCED",
    "NO_BACKEND",
    "Found",
    "gone",
    "is_full",
    "is_stopped",
    "not_accepting",
    "not_there",
    "refused",
    "spliced",
    "timed_out",
]

LISTEN = 1 << TCP_STATES.index("LISTEN") + 1
"""The state of servers' sockets, as SOCK_DIAG asks for it."""
_STOPPED = (b"T", b"t")


class Found(NamedTuple):
    """A cause, what shows it, and what to do."""

    cause: Cause
    because: str
    advice: str


NO_BACKEND = Found(
    Cause.NO_BACKEND,
    "it is a frontend of a service that has no backend in service here",
    "`sockhop get backends` shows the states of its backends",
)
NOT_BALANCED = Found(
    Cause.NOT_BALANCED,
    "it is a frontend, and the connection was not balanced: it went to the address itself",
    "`sockhop status` says which cgroup is balanced, and since when; `clients` of the service says "
    "whom it serves",
)
_CLOSED = Found(
    Cause.NOT_ANSWERING,
    "the connection is established and then closed by the server, without an answer",
    "look into the server's log: it has taken the connection",
)
_NO_PORT = Found(
    Cause.NO_PORT,
    "connect() fails at once: all local ports are in use towards this target",
    "`ss -s` counts connections; net.ipv4.ip_local_port_range says which ports there are",
)
_DENIED = Found(
    Cause.DENIED,
    "connect() fails at once with EPERM",
    "`sockhop get policies` and `sockhop explain` tell which rules hold; other tools' cgroup "
    "programs are in `bpftool cgroup tree`",
)
AT_ONCE = {Result.CLOSED: _CLOSED, Result.NO_PORT: _NO_PORT, Result.DENIED: _DENIED}
MTU = Found(
    Cause.MTU,
    "the answer does not arrive; with segments of 536 bytes it does",
    "a link on the way takes less than it says, and the ICMP messages about it are lost: lower the "
    "MTU of the route (ip route change ... mtu), or let ICMP pass",
)


def gone(backend: str, result: Result) -> Found:
    """Say that a backend cannot be connected to, whoever dials it."""
    return Found(
        Cause.BACKEND_GONE,
        f"the backend {backend}, dialled by itself: {result}",
        f"start it, or take it out of service: `sockhop backend quarantine {backend}`",
    )


def refused(owners: Sequence[Namespace], listeners: Sequence[Socket]) -> Found:
    """Say why a connection was refused; *owners* have the address, *listeners* listen there."""
    if listeners:
        return Found(
            Cause.FILTERED,
            "a server listens, and yet the connection is refused: something answers in its place",
            "look for rules with `reject` (nft list ruleset), in both namespaces",
        )
    return Found(
        Cause.NOT_LISTENING,
        f"the connection is refused; in {_named(owners)} no socket listens there"
        if owners
        else "the connection is refused by another node",
        "start the server, or have it listen at this address",
    )


def timed_out(owners: Sequence[Namespace], listeners: Sequence[Socket]) -> Found:
    """Say why nothing answers to a connect()."""
    if any(is_full(each) for each in listeners):
        return not_accepting(listeners, "the kernel drops new connections")
    if not owners:
        because = "no answer at all, and no network namespace of this node has the address"
        return Found(
            Cause.FILTERED, because, "look on the way there, and whether the address is in use"
        )
    return Found(
        Cause.FILTERED,
        f"no answer at all from {_named(owners)} of this node"
        + (", where a server listens with room in its queue" if listeners else ""),
        "look at the filters (nft list ruleset) and at rp_filter, in both namespaces",
    )


def not_there(owners: Sequence[Namespace], listeners: Sequence[Socket]) -> Found:
    """Say why an established connection has no other end on this node."""
    if any(is_full(each) for each in listeners):
        return not_accepting(listeners, "the server's end was never made")
    if owners:
        return Found(
            Cause.FILTERED,
            "the connection is established here, and its other end is not on this node's address",
            "something between the two answers in the server's place: look for proxies and NAT",
        )
    return Found(
        Cause.NOT_ANSWERING,
        "the connection is established; its other end is not on this node",
        "run doctor there, too",
    )


def not_accepting(listeners: Sequence[Socket], what: str) -> Found:
    """Say that connections wait in the queues of *listeners*; *what* was seen of it."""
    holders = find_holders([each.inode for each in listeners])
    names = sorted({str(one) for each in holders.values() for one in each})
    stopped = any(is_stopped(one.pid) for each in holders.values() for one in each)
    queues = ", ".join(f"{each.unread} of {each.waiting + 1}" for each in listeners)
    return Found(
        Cause.NOT_ACCEPTING,
        f"{what}; {', '.join(names) or 'the server'}{' (it is stopped)' if stopped else ''} does "
        f"not call accept(): {queues} places of its queue are taken",
        "look into that process; a longer queue (listen(), net.core.somaxconn) only delays it",
    )


def spliced(of: HalfSpliced) -> Found:
    """Say what a half-spliced pair comes from, and how it shows."""
    stale = "stale" in of.cause
    one, victim = of.spliced, of.victim
    shows = [
        of.cause,
        f"the pair is half-spliced: {one.local} ({one.handler}) splices to it, and not to "
        f"{victim.local} ({victim.handler}) "
        f"of {', '.join(victim.processes) or '?'}",
    ]
    if of.strayed:
        shows.append(f"{of.strayed:,} bytes wait there, where nobody expects them")
    if of.still:
        shows.append(
            f"no segment moves: segs_out stays {one.segs_out}, segs_in stays {one.segs_in}"
        )
    return Found(
        Cause.STALE_ENTRY if stale else Cause.HALF_SPLICED,
        "; ".join(shows),
        "`sockhop heal` deletes the entry"
        if stale
        else "two connections share a key: the program that fills the map has to tell network "
        "namespaces apart; turn its splicing off",
    )


def is_full(listener: Socket) -> bool:
    """Whether the accept queue takes no more: `waiting` is its limit (net/ipv4/tcp_diag.c)."""
    return listener.unread > listener.waiting


def _named(owners: Sequence[Namespace]) -> str:
    return f"network namespace {' or '.join(str(each.inode) for each in owners)}"


def is_stopped(pid: int) -> bool:
    """Whether a process has been stopped (SIGSTOP), or is being traced."""
    with suppress(OSError):
        state = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0]
        return state in _STOPPED
    return False
