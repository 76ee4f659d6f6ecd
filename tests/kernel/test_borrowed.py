"""Duplicates of other processes' sockets: what if the descriptor is something else by then."""

import os
import socket

import pytest

from sockhop.kernel.procfs import Holder, borrowed
from sockhop.kernel.syscall import KernelError

pytestmark = pytest.mark.kernel


def test_a_descriptor_that_is_no_socket_any_more() -> None:
    own = socket.socket()
    number = own.fileno()
    holder = Holder("python", os.getpid(), number)
    with borrowed(holder) as duplicate:
        assert duplicate.family == socket.AF_INET
    own.close()
    with pytest.raises(KernelError), borrowed(holder):
        pass
    reader, writer = os.pipe()
    try:
        assert number in (reader, writer)
        before = len(os.listdir("/proc/self/fd"))
        with pytest.raises(KernelError, match="Bad file descriptor"), borrowed(holder):
            pass
        assert len(os.listdir("/proc/self/fd")) == before
    finally:
        os.close(reader)
        os.close(writer)
