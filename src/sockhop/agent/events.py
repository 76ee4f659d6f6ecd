"""What was done to live sockets, and why: a bounded file that outlives the agent.

JSON, one event a line. Whoever ends or moves sockets appends to it: the agent, and the commands
that do so by hand. When the file is full it takes the place of the one before.
"""

import fcntl
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from enum import StrEnum
from pathlib import Path

import msgspec

from sockhop.errors import SystemLackError

__all__ = ["Event", "EventKind", "EventLog", "events_path"]

FILE_MAX = 4 << 20
"""Bytes of one file; with the one before it there are at most twice as many, and one append."""

_POLL = 0.1
_CHUNK = 1 << 16


class EventKind(StrEnum):
    """What has happened: to one socket, or (from CHANGE to PARKED) by a change to many.

    HEALED: a stale entry of a sockhash was deleted; the ends are those that its key names. SET: a
    backend has a state by hand, or no more. FOUND and OVER: something that is wrong was seen for
    the first time, or no more.
    """

    SEVERED = "severed"
    RESTEERED = "resteered"
    REFUSED = "refused"
    HEALED = "healed"
    CHANGE = "change"
    HELD = "held"
    APPROVED = "approved"
    PARKED = "parked"
    SET = "set"
    FOUND = "found"
    OVER = "over"


class Event(msgspec.Struct, frozen=True, omit_defaults=True):
    """Something that was done to a socket, or why nothing was.

    `time` in Unix seconds; `change` the generation that the agent gave the change, 0 for what was
    done by hand; `reason` says why; `sockets` counts those that an event about many is about.
    The others are as in `get sockets`: `netns` an inode, `processes` as command/pid.
    """

    time: float
    kind: EventKind
    reason: str
    change: int = 0
    service: str = ""
    intent: str = ""
    protocol: str = ""
    local: str = ""
    remote: str = ""
    frontend: str = ""
    backend: str = ""
    cookie: int = 0
    netns: int = 0
    processes: list[str] = []
    sockets: int = 0


_DECODER = msgspec.json.Decoder(Event)


def events_path(api: Path) -> Path:
    """Return where the events are, given the agent's socket: api.sock has api.events beside it."""
    return api.with_suffix(".events")


class EventLog:
    """The events in the file at `path`, oldest first."""

    def __init__(self, path: Path, *, file_max: int = FILE_MAX) -> None:
        self.path = path
        self._older = path.with_name(path.name + ".1")
        self._file_max = file_max

    def append(self, events: Iterable[Event]) -> None:
        """Add *events*, all together. SystemLackError where the file cannot be written."""
        data = b"".join(msgspec.json.encode(event) + b"\n" for event in events)
        if not data:
            return
        try:
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with self._locked() as fd:
                size = os.fstat(fd).st_size
                if size and os.pread(fd, 1, size - 1) != b"\n":
                    data = b"\n" + data  # whoever wrote last was killed in the middle
                while data:
                    data = data[os.write(fd, data) :]
                if os.fstat(fd).st_size >= self._file_max:
                    self.path.replace(self._older)
        except OSError as error:
            raise SystemLackError(
                f"{self.path}: {error.strerror or error}",
                hint="events are kept beside the agent's socket (--api, SOCKHOP_API)",
            ) from None

    def read(self) -> Iterator[Event]:
        """Yield the events. A line that a killed writer left is passed over."""
        for path in (self._older, self.path):
            yield from _decoded(_lines(path))

    def follow(self, last: int = 0) -> Iterator[Event]:
        """Yield the *last* events, and then for ever those that are added."""
        before, fd, at, rest = self._start()
        try:
            yield from before[max(len(before) - last, 0) :]
            while True:
                # Looked at first: nothing is added to a file that is no longer at the path.
                replaced = fd < 0 or not _is_at(fd, self.path)
                while fd >= 0 and (data := os.pread(fd, _CHUNK, at)):
                    at += len(data)
                    *lines, rest = (rest + data).split(b"\n")
                    yield from _decoded(lines)
                if replaced and self.path.exists():
                    if fd >= 0:
                        os.close(fd)
                    fd, at, rest = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC), 0, b""
                else:
                    time.sleep(_POLL)
        finally:
            if fd >= 0:
                os.close(fd)

    def _start(self) -> tuple[list[Event], int, int, bytes]:
        """Return all events, the open file or -1, how far it was read, and its unfinished line."""
        older = _lines(self._older)
        try:
            fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return list(_decoded(older)), -1, 0, b""
        data = b"".join(iter(lambda: os.read(fd, _CHUNK), b""))
        *lines, rest = data.split(b"\n")
        return list(_decoded([*older, *lines])), fd, len(data), rest

    def of_socket(self, cookie: int) -> list[Event]:
        """Return what has been done to the socket with this cookie."""
        return [event for event in self.read() if event.cookie == cookie]

    @contextmanager
    def _locked(self) -> Iterator[int]:
        while True:
            fd = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX)
                if _is_at(fd, self.path):  # else another writer has put it aside meanwhile
                    yield fd
                    return
            finally:
                os.close(fd)


def _lines(path: Path) -> list[bytes]:
    try:
        return path.read_bytes().splitlines()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise SystemLackError(f"{path}: {error.strerror}", hint="run as root") from None


def _is_at(fd: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), path.stat())
    except FileNotFoundError:
        return False


def _decoded(lines: Iterable[bytes]) -> Iterator[Event]:
    for line in lines:
        with suppress(msgspec.DecodeError):
            yield _DECODER.decode(line)
