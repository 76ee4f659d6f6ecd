"""A connection to which something happens, and what both ends see of it."""

import contextlib
import errno
import itertools
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from sockhop.kernel import netns
from tests.splice.stage import Place, Stage

__all__ = ["PATIENCE", "Run", "Seen", "Sequence", "misdelivered", "run_all"]

PATIENCE = 2.0
_PORTS = 20000


class Run:
    """One connection, what happens to it, and what both ends see of it."""

    def __init__(self, stage: Stage, place: Place, number: int) -> None:
        self.stage = stage
        self.place = place
        self.port = _PORTS + 2 * number
        self.seen: list[str] = []
        self.kept: dict[str, socket.socket] = {}
        self.server: socket.socket | None = None
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> "Run":
        self.listener = self.stage.listen(self.place, self.port)
        self.client = self.dial()
        return self

    def __exit__(self, *_: object) -> None:
        for each in (self.listener, self.client, self.server, *self.kept.values()):
            if each is not None:
                each.close()
        self._stack.close()

    def dial(self) -> socket.socket:
        """Connect from the same local port to the same server; wait while the tuple is taken."""
        end = time.monotonic() + PATIENCE
        while True:
            made = self.stage.client(self.place, self.port + 1)
            made.settimeout(PATIENCE)
            try:
                made.connect((self.place.target, self.port))
                return made
            except OSError as error:
                made.close()
                if time.monotonic() > end or error.errno not in (
                    errno.EADDRNOTAVAIL,
                    errno.EADDRINUSE,
                ):
                    raise
                time.sleep(0.05)

    def accept(self) -> socket.socket:
        self.listener.settimeout(PATIENCE)
        self.server = self.listener.accept()[0]
        self.server.settimeout(PATIENCE)
        return self.server

    def talk(self) -> socket.socket:
        """Accept, and let both ends say something, so that both directions are decided."""
        server = self.accept()
        self.client.sendall(b"ping")
        self.read("server", server, 4)
        server.sendall(b"pong")
        self.read("client", self.client, 4)
        return server

    def note(self, text: str) -> None:
        self.seen.append(text)

    def read(self, name: str, of: socket.socket, size: int = 4096) -> bytes:
        """Read once."""
        data = b""
        try:
            data = of.recv(size)
            self.note(f"{name} reads {data!r}")
        except TimeoutError:
            self.note(f"{name} reads nothing")
        except OSError as error:
            self.note(f"{name} reads {errno.errorcode[error.errno or 0]}")
        return data

    def drain(self, name: str, of: socket.socket) -> None:
        """Read to the end, without waiting for it."""
        of.settimeout(0.3)
        while self.read(name, of):
            pass

    def write(self, name: str, of: socket.socket, data: bytes) -> None:
        try:
            of.sendall(data)
            self.note(f"{name} writes")
        except OSError as error:
            self.note(f"{name} writes: {errno.errorcode[error.errno or 0]}")

    def destroy(self, of: socket.socket) -> None:
        """End a socket with SOCK_DESTROY."""
        family, where = of.family, of.getsockname()[1]
        peer = of.getpeername()[1]
        crosses = of is self.client and self.place.crosses
        with netns.entered(self.stage.other if crosses else self.stage.sandbox.netns):
            subprocess.run(
                ["ss", "-K", "-tHn", "-6" if family == socket.AF_INET6 else "-4",
                 f"sport = :{where} and dport = :{peer}"],
                check=True, capture_output=True,
            )  # fmt: skip

    def hand_over(self, *sockets: socket.socket) -> "subprocess.Popen[bytes]":
        """Give sockets to another process, which alone holds them from now on."""
        process = self.share(*sockets)
        for each in sockets:
            each.close()
        return process

    def share(self, *sockets: socket.socket) -> "subprocess.Popen[bytes]":
        """Let another process hold sockets, too."""
        process = subprocess.Popen(["sleep", "60"], pass_fds=[each.fileno() for each in sockets])
        self._stack.callback(process.wait)
        self._stack.callback(process.kill)
        return process

    def settle(self) -> None:
        time.sleep(0.2)

    def again(self) -> None:
        """Connect anew on the same tuple, and let both ends say something."""
        self.settle()
        if self.listener.fileno() < 0:
            self.listener = self.stage.listen(self.place, self.port)
        try:
            new = self.dial()
        except OSError as error:
            self.note(f"again: {errno.errorcode[error.errno or 0]}")
            return
        self.listener.settimeout(PATIENCE)
        there = self.listener.accept()[0]
        with new, there:
            for name, source, target in (("server", new, there), ("client", there, new)):
                source.sendall(b"new to " + name.encode())
                target.settimeout(PATIENCE)
                self.read(f"new {name}", target)
            for name, old in self.kept.items():
                old.settimeout(0.05)
                self.read(f"old {name}", old)


Sequence = Callable[[Run], None]
Seen = dict[tuple[Place, str], list[str]]


def run_all(stage: Stage, sequences: Iterable[Sequence], places: Iterable[Place]) -> Seen:
    """Run every sequence in every place, all at once, and each time a connection on the same tuple.

    Return what the ends have seen, by place and the sequence's name.
    """
    seen: Seen = {}
    for where in (stage.sandbox.netns, stage.other):
        with netns.entered(where):
            # One close in some thousands leaves a whole socket in FIN-WAIT-2 instead of a TIME-WAIT
            # one, with or without splicing: where the ACK of its FIN arrives while close() holds it
            # (net/ipv4/tcp_input.c, tcp_rcv_state_process). For so long nobody else has its ports.
            Path("/proc/sys/net/ipv4/tcp_fin_timeout").write_text("1")

    def play(number: int, place: Place, sequence: Sequence) -> None:
        name = place, sequence.__name__.removeprefix("_")
        try:
            with Run(stage, place, number) as run:
                seen[name] = run.seen
                sequence(run)
                run.again()
        except Exception as error:  # noqa: BLE001 (what is not expected is seen, too)
            seen.setdefault(name, []).append(f"{type(error).__name__}: {error}")

    threads = [
        threading.Thread(target=play, args=(number, *what))
        for number, what in enumerate(itertools.product(places, sequences))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return seen


def misdelivered(seen: list[str]) -> list[str]:
    """Return what a new connection should have seen and did not, or an old one saw."""
    wanted = ["new server reads b'new to server'", "new client reads b'new to client'"]
    missing = [line for line in wanted if line not in seen]
    return missing + [line for line in seen if "old" in line and "new to" in line]
