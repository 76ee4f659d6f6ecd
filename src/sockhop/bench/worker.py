"""A process in a room: pinned to one CPU, it dials, serves or watches as it is told.

`python -m sockhop.bench.worker CPU [new]`: with `new` it makes itself a network namespace first.
Requests are read from standard input, a line each; it ends with it.
"""

import os
import socket
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec

from sockhop.bench._loops import ffi, lib
from sockhop.bench.messages import (
    Answer,
    Dial,
    Listen,
    Loop,
    Operation,
    Pin,
    Places,
    Request,
    Stages,
    Talk,
    TalkServer,
    Watch,
)
from sockhop.errors import SockhopError
from sockhop.model import Protocol

__all__ = ["main"]

_TYPES = {Protocol.TCP: socket.SOCK_STREAM, Protocol.UDP: socket.SOCK_DGRAM}
_LOOPS = {Operation.CONNECT: lib.connect_and_close, Operation.ASK: lib.ask_and_close}
_SERVERS = {Protocol.TCP: lib.serve_tcp, Protocol.UDP: lib.serve_udp}

_WARM_UP = 64
"""Connections before those that are timed: a server that has slept is slow at first."""


class _Worker:
    def __init__(self) -> None:
        self._places: dict[str, tuple[Any, Any, int]] = {}
        self._dialled: socket.socket | None = None

    def answer(self, request: Request) -> Answer:
        match request:
            case Places():
                return self._keep(request)
            case Loop():
                return self._loop(request)
            case Listen():
                return _listen(request)
            case Watch():
                return _watch(request)
            case Pin():
                os.sched_setaffinity(0, {request.cpu})
                return Answer()
            case TalkServer() | Dial() | Talk():
                return self._talk(request)
            case Stages():
                # It imports all of the agent, which no other worker needs.
                from sockhop.bench.stages import measure_stages  # noqa: PLC0415

                return Answer(stages=measure_stages(Path(request.manifests), Path(request.pins)))

    def _talk(self, request: TalkServer | Dial | Talk) -> Answer:
        match request:
            case TalkServer():
                made = _talk_socket(request.port)
                made.bind((request.where, request.port) if request.port else request.where)
                made.listen(16)
                serve = threading.Thread(target=lib.serve_talk, args=(made.detach(),), daemon=True)
                serve.start()
            case Dial():
                if self._dialled is not None:
                    self._dialled.close()
                self._dialled = _talk_socket(request.port)
                self._dialled.connect(
                    (request.where, request.port) if request.port else request.where
                )
            case Talk():
                assert self._dialled is not None
                loop = lib.stream if request.is_stream else lib.exchange
                taken = ffi.new("struct taken *")
                result = loop(self._dialled.fileno(), request.size, request.count, taken)
                if result < 0:
                    return Answer(error=f"{request}: {os.strerror(-result)}")
                names = ("wall", "client_cpu", "server_cpu")
                return Answer(stages={name: float(getattr(taken, name)) for name in names})
        return Answer()

    def _keep(self, request: Places) -> Answer:
        addresses = ffi.new("uint32_t[]", len(request.places))
        ports = ffi.new("uint16_t[]", [socket.htons(port) for _, port in request.places])
        ffi.buffer(addresses)[:] = b"".join(socket.inet_aton(host) for host, _ in request.places)
        self._places[request.name] = addresses, ports, len(request.places)
        return Answer()

    def _loop(self, request: Loop) -> Answer:
        loop = _LOOPS[request.operation]
        arguments = (_TYPES[request.protocol], *self._places[request.places])
        loop(*arguments, _WARM_UP)
        result = loop(*arguments, request.count)
        if result < 0:
            return Answer(
                error=f"{request.operation} {request.protocol}, {request.places}: "
                f"{os.strerror(-result)}"
            )
        return Answer(value=result)


def _talk_socket(port: int) -> socket.socket:
    made = socket.socket(socket.AF_INET if port else socket.AF_UNIX)
    if port:
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return made


def _listen(request: Listen) -> Answer:
    for place in request.places:
        for protocol, serve in _SERVERS.items():
            made = socket.socket(socket.AF_INET, _TYPES[protocol])
            made.bind(place)
            if protocol is Protocol.TCP:
                made.listen(4096)
            threading.Thread(target=serve, args=(made.detach(),), daemon=True).start()
    return Answer()


def _watch(request: Watch) -> Answer:
    begin = time.monotonic()
    end = begin + request.seconds
    if request.rename:
        Path(request.rename[0]).rename(request.rename[1])
    while (now := time.monotonic()) < end:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, suppress(OSError):
            probe.connect((request.address, request.port))
            if probe.getsockname()[0] == request.source:
                now = time.monotonic()
                return Answer(value=now - begin if request.rename else now)
        time.sleep(request.pause)
    return Answer()


def main() -> None:
    """Run a worker, see the module."""
    os.sched_setaffinity(0, {int(sys.argv[1])})
    if "new" in sys.argv[2:] and lib.unshare(lib.CLONE_NEWNET) < 0:
        _say(Answer(error=os.strerror(ffi.errno)))
        return
    _say(Answer())
    worker, decoder = _Worker(), msgspec.json.Decoder(Request)
    for line in sys.stdin.buffer:
        try:
            _say(worker.answer(decoder.decode(line)))
        except (OSError, SockhopError) as error:
            _say(Answer(error=str(error)))


def _say(answer: Answer) -> None:
    sys.stdout.buffer.write(msgspec.json.encode(answer) + b"\n")
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
