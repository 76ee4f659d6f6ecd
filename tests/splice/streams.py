"""Many connections at once, each with random messages and reads both ways, checked byte by byte."""

import random
import selectors
import socket
from collections.abc import Iterator
from typing import NamedTuple

from tests.splice.stage import Place, Stage
from tests.splice.tcpinfo import tcp_info

__all__ = ["Outcome", "run_streams"]

_PERIOD = 1 << 20
_LONGEST = 1 << 18
_POOL = random.Random(0).randbytes(_PERIOD)
_POOL += _POOL[:_LONGEST]


class Outcome(NamedTuple):
    """Of directions: how many, that were spliced at first, and that were from end to end."""

    directions: int
    spliced: int
    wholly: int
    bytes: int


class _End:
    """One end: what it still has to send, and what it should get."""

    def __init__(self, of: socket.socket, choose: random.Random, sends: int, gets: int) -> None:
        of.setblocking(False)
        self.socket = of
        self.choose = choose
        self.sends, self.gets = sends, gets
        self.sent = self.got = 0
        self.ended = False
        self.shut = False
        self.outgoing = self.incoming = 0
        """Where its streams begin in the pool: no two streams are the same."""
        self.message = memoryview(b"")
        self.idle = 0

    @property
    def done(self) -> bool:
        return self.ended and self.shut

    def write(self) -> bool:
        """Send some; False when it has nothing more to say."""
        if self.shut:
            return False
        if not self.message and self.sent < self.sends:
            size = min(self.sends - self.sent, _message_size(self.choose))
            start = (self.outgoing + self.sent) % _PERIOD
            self.message = memoryview(_POOL)[start : start + size]
        if self.message:
            try:
                n = self.socket.send(self.message)
            except BlockingIOError:
                return True
            self.sent += n
            self.message = self.message[n:]
            return True
        self.socket.shutdown(socket.SHUT_WR)
        self.shut = True
        return False

    def read(self) -> None:
        data = self.socket.recv(self.choose.choice((1, 7, 100, 1500, 4096, 65536)))
        start = (self.incoming + self.got) % _PERIOD
        assert data == _POOL[start : start + len(data)], f"other bytes at {self.got}"
        self.got += len(data)
        if not data:
            assert self.got == self.gets, f"{self.got} of {self.gets} bytes, then the end"
            self.ended = True


def _message_size(choose: random.Random) -> int:
    return choose.choice((1, 10, 100, 1000, 1000, 10_000, 70_000, 200_000))


def _stream_size(choose: random.Random) -> int:
    return int(2 ** choose.uniform(0, 19)) if choose.random() < 0.9 else 0


def run_streams(
    stage: Stage, place: Place, *, count: int, seed: int, at_once: int = 100
) -> Outcome:
    """Run *count* connections; AssertionError where a byte is lost, late, early or wrong."""
    choose = random.Random(seed)
    total = Outcome(0, 0, 0, 0)
    with stage.listen(place) as listener:
        pairs = _pairs(stage, place, listener, choose)
        for first in range(0, count, at_once):
            ends = [end for _ in range(min(at_once, count - first)) for end in next(pairs)]
            _pump(ends, choose)
            outcome = _judge(ends)
            total = Outcome(*(a + b for a, b in zip(total, outcome, strict=True)))
            for end in ends:
                end.socket.close()
    return total


def _pairs(
    stage: Stage, place: Place, listener: socket.socket, choose: random.Random
) -> Iterator[tuple[_End, _End]]:
    while True:
        client = stage.client(place)
        client.connect((place.target, listener.getsockname()[1]))
        there, back = _stream_size(choose), _stream_size(choose)
        one = _End(client, choose, there, back)
        other = _End(listener.accept()[0], choose, back, there)
        one.outgoing = other.incoming = choose.randrange(_PERIOD)
        other.outgoing = one.incoming = choose.randrange(_PERIOD)
        yield one, other


def _pump(ends: list[_End], choose: random.Random) -> None:
    """Let all ends read and write as they can, some of them slowly, until all have ended."""
    with selectors.EpollSelector() as selector:
        both = selectors.EVENT_READ | selectors.EVENT_WRITE
        for end in ends:
            selector.register(end.socket, both, end)
        left = len(ends)
        while left:
            events = selector.select(10)
            assert events, f"{left} ends are stuck"
            choose.shuffle(events)
            for key, mask in events:
                end = key.data
                if end.idle:
                    end.idle -= 1
                    continue
                if choose.random() < 0.02:
                    end.idle = choose.randrange(100)
                if mask & selectors.EVENT_READ and not end.ended:
                    end.read()
                if mask & selectors.EVENT_WRITE:
                    end.write()
                events_now = (0 if end.ended else selectors.EVENT_READ) | (
                    0 if end.shut else selectors.EVENT_WRITE
                )
                if not events_now:
                    selector.unregister(end.socket)
                    left -= 1
                elif events_now != key.events:
                    selector.modify(end.socket, events_now, end)


def _judge(ends: list[_End]) -> Outcome:
    """Ask the stack how much of each direction it has carried."""
    spoke = [end for end in ends if end.sent]
    infos = [(end, tcp_info(end.socket)) for end in spoke]
    return Outcome(
        len(spoke),
        sum(info.bytes_sent < end.sent for end, info in infos),
        sum(info.data_segs_out == 0 and info.bytes_sent == 0 for end, info in infos),
        sum(end.sent for end in spoke),
    )
