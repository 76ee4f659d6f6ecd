"""What processes are called: any may choose its own name, from any bytes."""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from sockhop.diagnose.sentences import is_stopped
from sockhop.kernel.procfs import Holder, command_of, find_holders, started_at

pytestmark = pytest.mark.unit

CALLED = """
import ctypes, sys
ctypes.CDLL(None).prctl(15, bytes.fromhex(sys.argv[1]))
print(flush=True)
sys.stdin.read()
"""


@contextmanager
def called(name: bytes, held: socket.socket) -> Iterator[int]:
    """Have a process of that name that holds a socket, too."""
    with subprocess.Popen(
        [sys.executable, "-Ec", CALLED, name.hex()],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=[held.fileno()],
    ) as process:  # fmt: skip
        assert process.stdout
        assert process.stdin
        process.stdout.readline()
        yield process.pid
        process.stdin.close()


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        (b"\xff\xfe) S 1 2", "\ufffd\ufffd) S 1 2"),
        (b"a\x1b[2J\nb\r", r"a\x1b[2J\x0ab\x0d"),
        ("käse ".encode(), "käse "),
    ],
    ids=["no UTF-8", "control characters", "UTF-8"],
)
def test_whatever_a_process_calls_itself(name: bytes, shown: str) -> None:
    with socket.socket() as own, called(name, own) as pid:
        assert command_of(pid) == shown
        inode = os.fstat(own.fileno()).st_ino
        holders = find_holders([inode])[inode]
        assert Holder(shown, pid, own.fileno()) in holders
        assert started_at(os.getpid()) - 1 <= started_at(pid)
        assert not is_stopped(pid)
