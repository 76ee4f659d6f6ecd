"""Moves a socket as a process that may not: python -m tests.datapath.outsider PINS COOKIE [seccomp]

With `seccomp` the kernel answers EPERM to pidfd_getfd(2), as container runtimes make it do.
"""

import ctypes
import struct
import sys
from pathlib import Path

from sockhop.datapath.ending import choose_engine
from sockhop.datapath.resteer import Resteerer
from sockhop.datapath.sockets import Sockets

__all__ = ["forbid_getfd", "main"]

_PIDFD_GETFD = 438
_LD_NUMBER, _JEQ, _RET = 0x20, 0x15, 0x06  # linux/bpf_common.h; the number is at offset 0
_ALLOW, _ERRNO_EPERM = 0x7FFF0000, 0x00050001
_PR_SET_SECCOMP, _FILTER = 22, 2


def forbid_getfd() -> None:
    """Let this process' pidfd_getfd() fail from now on (seccomp(2))."""
    rows = [
        (_LD_NUMBER, 0, 0, 0),
        (_JEQ, 0, 1, _PIDFD_GETFD),
        (_RET, 0, 0, _ERRNO_EPERM),
        (_RET, 0, 0, _ALLOW),
    ]
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *row) for row in rows))
    program = ctypes.create_string_buffer(struct.pack("@HP", len(rows), ctypes.addressof(code)))
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_SECCOMP, _FILTER, program):
        raise OSError(ctypes.get_errno(), "PR_SET_SECCOMP")


def main(pins: str, cookie: str, *options: str) -> None:
    """Print what was done and what stood against it."""
    if options:
        forbid_getfd()
    with (
        Sockets(Path(pins)) as sockets,
        choose_engine(Path(pins)) as engine,
        Resteerer(Path(pins)) as resteerer,
    ):
        target = next(each for each in sockets.remembered() if each.cookie == int(cookie))
        (outcome,) = resteerer.resteer([target], engine.sever_sockets)
    print(outcome.action, outcome.obstacle, outcome.reason, sep="|")


if __name__ == "__main__":
    main(*sys.argv[1:])
