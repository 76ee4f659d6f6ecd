"""Live connections of a process of its own, in use and replaced all the time.

As a program, `python -m tests.diagnose.crowd MAP NUMBER`, it opens so many connections to itself,
says so, uses and replaces them at random until its standard input ends, uses each once more, and
prints what it has seen. MAP is the id of a sockhash by tuple that has their sockets.
"""

import contextlib
import json
import os
import random
import resource
import select
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sockhop.kernel._libbpf import ffi, lib
from sockhop.kernel.maps import open_map

__all__ = ["crowd", "held_under_own_key"]

_REPLACED = 0.2
_PAUSE = 0.001
"""Seconds between two uses: else the crowd takes a CPU for itself."""


def held_under_own_key(fd: int, of: socket.socket) -> bool:
    """Whether a sockhash by tuple (bpf/vanilla.bpf.c) has this IPv4 socket under its own key."""
    (here, port), (there, peer) = of.getsockname(), of.getpeername()
    key = (
        *(bytes(12), socket.inet_aton(here), bytes(12), socket.inet_aton(there)),
        *(port.to_bytes(4, "little"), peer.to_bytes(4, "little")),
    )
    value = ffi.new("__u64 *")
    cookie = of.getsockopt(socket.SOL_SOCKET, 57, 8)
    found = lib.bpf_map_lookup_elem(fd, b"".join(key), value) == 0
    return found and int(value[0]) == int.from_bytes(cookie, "little")


class _Connection:
    def __init__(self, fd: int, listener: socket.socket) -> None:
        self._map = fd
        self._ends = socket.create_connection(listener.getsockname()), listener.accept()[0]
        for each in self._ends:
            each.settimeout(20)
        self._inside = self._look()

    def _look(self) -> list[bool]:
        return [held_under_own_key(self._map, each) for each in self._ends]

    def use(self) -> list[str]:
        """Send something both ways; return what is wrong."""
        try:
            for one, other in (self._ends, self._ends[::-1]):
                text = os.urandom(8)
                one.sendall(text)
                if other.recv(9) != text:
                    return ["other bytes"]
        except OSError as error:
            return [f"{type(error).__name__}: {error}"]
        return [] if self._look() == self._inside else ["an entry was lost"]

    def close(self, *, reset: bool) -> None:
        if reset:
            self._ends[0].setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0" + bytes(4))
        for each in self._ends:
            each.close()


def _main(number: int, count: int) -> None:
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    fd, chosen = open_map(number), random.Random(number)
    with socket.create_server(("127.0.0.1", 0), backlog=1024) as listener:
        all_of_them = [_Connection(fd, listener) for _ in range(count)]
        print("ready", flush=True)
        uses, faults, opened = 0, [], count
        while not select.select([sys.stdin], [], [], 0)[0]:
            at = chosen.randrange(count)
            faults += all_of_them[at].use()
            uses += 1
            time.sleep(_PAUSE)
            if chosen.random() < _REPLACED:
                all_of_them[at].close(reset=chosen.random() < _REPLACED)
                all_of_them[at] = _Connection(fd, listener)
                opened += 1
        for each in all_of_them:
            faults += each.use()
        print(json.dumps({"uses": uses, "opened": opened, "faults": faults}))


@contextlib.contextmanager
def crowd(command: list[str], number: int, count: int) -> Iterator[dict[str, Any]]:
    """Have *count* live connections while the body runs; afterwards it is told what they saw.

    *command*: what runs another command in the sandbox; *number*: the id of the map.
    """
    seen: dict[str, Any] = {}
    with subprocess.Popen(
        [*command, sys.executable, "-m", "tests.diagnose.crowd", str(number), str(count)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parent.parent.parent,
    ) as process:
        try:
            assert process.stdout
            assert process.stdout.readline() == "ready\n"
            yield seen
            out, _ = process.communicate(timeout=300)
            seen.update(json.loads(out))
        finally:
            process.kill()


if __name__ == "__main__":
    _main(*map(int, sys.argv[1:]))
