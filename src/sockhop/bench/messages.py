"""What `sockhop bench` and its workers say to each other: a line of JSON each way."""

from enum import StrEnum

import msgspec

from sockhop.model import Protocol

__all__ = [
    "Answer",
    "Dial",
    "Listen",
    "Loop",
    "Operation",
    "Pin",
    "Places",
    "Request",
    "Stages",
    "Talk",
    "TalkServer",
    "Watch",
]


class Operation(StrEnum):
    """What a client loop does with each connection."""

    CONNECT = "connect"
    """socket, connect, close."""
    ASK = "ask"
    """And between them 64 bytes to the server and 64 bytes back; many at a time."""


class Places(msgspec.Struct, tag=True):
    """Keep IPv4 addresses and ports for :class:`Loop`, which dials them in turn."""

    name: str
    places: list[tuple[str, int]]


class Loop(msgspec.Struct, tag=True):
    """Make `count` connections; the answer is the nanoseconds that they took together."""

    operation: Operation
    protocol: Protocol
    places: str
    count: int


class Listen(msgspec.Struct, tag=True):
    """Serve these addresses and ports, TCP and UDP, until the end."""

    places: list[tuple[str, int]]


class Watch(msgspec.Struct, tag=True):
    """Connect UDP sockets to an address until one is connected and has the local address `source`.

    The answer is the CLOCK_MONOTONIC seconds of that, or 0 if it was not within `seconds`. `pause`:
    seconds between two tries. `rename`: a file to rename first, from and to; the answer then is
    the seconds from just before that.
    """

    address: str
    port: int
    source: str
    seconds: float
    pause: float
    rename: tuple[str, str] | None = None


class Stages(msgspec.Struct, tag=True):
    """Install manifests below `pins` without attaching; the answer names what took how long."""

    manifests: str
    pins: str


class Pin(msgspec.Struct, tag=True):
    """Run on this CPU from now on."""

    cpu: int


class TalkServer(msgspec.Struct, tag=True):
    """Answer :class:`Talk` at an IPv4 address and port, or where that is 0 at a Unix path."""

    where: str
    port: int


class Dial(msgspec.Struct, tag=True):
    """Connect to a :class:`TalkServer`; what was connected before is closed."""

    where: str
    port: int


class Talk(msgspec.Struct, tag=True):
    """Exchange messages of `size` bytes, or stream them, over what was dialled.

    The answer's stages are the nanoseconds `wall`, `client_cpu` and `server_cpu`.
    """

    is_stream: bool
    size: int
    count: int


Request = Places | Loop | Listen | Watch | Stages | Pin | TalkServer | Dial | Talk


class Answer(msgspec.Struct):
    """A number, or seconds by name, or what went wrong."""

    value: float = 0
    stages: dict[str, float] = {}
    error: str = ""
