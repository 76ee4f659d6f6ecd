"""Runs a command for which bpf(2) does not know BPF_LINK_CREATE, as before Linux 5.7.

Usage: python without_links.py COMMAND [ARGUMENT...]

A seccomp filter (seccomp(2), classic BPF) answers EINVAL, as the kernel does for what it does not
know. Everything else is the kernel's own.
"""

import ctypes
import errno
import os
import platform
import struct
import sys

BPF_SYSCALL = {"x86_64": 321, "aarch64": 280}[platform.machine()]
BPF_LINK_CREATE = 28
PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 38, 22, 2
RET_ERRNO, RET_ALLOW = 0x00050000, 0x7FFF0000
LOAD, JUMP_IF_EQUAL, RETURN = 0x20, 0x15, 0x06
# struct seccomp_data: the number of the call, then its arguments from byte 16 on.
FILTER = (
    (LOAD, 0, 0, 0),
    (JUMP_IF_EQUAL, 0, 3, BPF_SYSCALL),
    (LOAD, 0, 0, 16),
    (JUMP_IF_EQUAL, 0, 1, BPF_LINK_CREATE),
    (RETURN, 0, 0, RET_ERRNO | errno.EINVAL),
    (RETURN, 0, 0, RET_ALLOW),
)


def forget_links() -> None:
    """Do so for this thread and all that it starts."""
    libc = ctypes.CDLL(None, use_errno=True)
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *line) for line in FILTER))
    program = ctypes.create_string_buffer(
        struct.pack("@HP", len(FILTER), ctypes.addressof(code))  # struct sock_fprog
    )
    for arguments in (
        (PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0),
        (PR_SET_SECCOMP, SECCOMP_MODE_FILTER, program, 0, 0),
    ):
        if libc.prctl(*arguments):
            raise OSError(ctypes.get_errno(), "prctl")


if __name__ == "__main__":
    forget_links()
    os.execvp(sys.argv[1], sys.argv[1:])
