"""What can be wrong with connections, in words. Imports nothing of the kernel: quick to load."""

from enum import StrEnum

import msgspec

__all__ = ["Cause", "Finding"]


class Cause(StrEnum):
    """What can be wrong."""

    NOT_LISTENING = "server not listening"
    NOT_ACCEPTING = "server not accepting"
    NOT_ANSWERING = "server accepts and does not answer"
    FILTERED = "filtered on the way"
    STALE_ENTRY = "stale sockmap entry"
    HALF_SPLICED = "half-spliced pair"
    NO_BACKEND = "no backend"
    NOT_BALANCED = "not balanced"
    BACKEND_GONE = "backend that is gone"
    DENIED = "policy denial"
    MTU = "MTU black hole"
    NO_ROUTE = "no route"
    NO_PORT = "no free local port"

    @property
    def layer(self) -> str:
        """Where it lies, between the program that dials and the one that should answer."""
        return _LAYERS[self]


_LAYERS = {
    Cause.NOT_LISTENING: "the server's program",
    Cause.NOT_ACCEPTING: "the server's program",
    Cause.NOT_ANSWERING: "the server's program",
    Cause.FILTERED: "packet filters",
    Cause.STALE_ENTRY: "sockets: a sockmap",
    Cause.HALF_SPLICED: "sockets: a sockmap",
    Cause.NO_BACKEND: "balancing",
    Cause.NOT_BALANCED: "balancing",
    Cause.BACKEND_GONE: "balancing",
    Cause.DENIED: "policies",
    Cause.MTU: "packets: their size",
    Cause.NO_ROUTE: "routes",
    Cause.NO_PORT: "sockets: ports",
}


class Finding(msgspec.Struct, frozen=True):
    """Something that is wrong on this node: what shows it, and what to do.

    `since` is when it was first seen, in Unix seconds. `local`, `remote`: whose connection is
    harmed, if it is one; `netns`: its namespace (inode), or that of the server; `processes` as
    command/pid.
    """

    cause: Cause
    because: str
    advice: str
    since: float
    local: str = ""
    remote: str = ""
    netns: int = 0
    processes: list[str] = []
