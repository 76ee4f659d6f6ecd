"""That hooks are waited for is shown by test_atomic_change.py; here, that it needs nothing rare."""

import subprocess
import sys

import pytest

pytestmark = pytest.mark.kernel

# As with nohz_full, where no CPU may be disturbed: EINVAL from membarrier(2).
CHILD = """
import ctypes, errno, platform, struct
from sockhop.kernel.syscall import grace_period

NUMBER = {"x86_64": 324, "aarch64": 283}[platform.machine()]
LOAD, JUMP_IF_EQUAL, RETURN = 0x20, 0x15, 0x06
ALLOW, REFUSE = 0x7FFF0000, 0x00050000 | errno.EINVAL
rows = [(LOAD, 0, 0, 0), (JUMP_IF_EQUAL, 0, 1, NUMBER), (RETURN, 0, 0, REFUSE),
        (RETURN, 0, 0, ALLOW)]
code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *row) for row in rows))
program = struct.pack("@HP", len(rows), ctypes.addressof(code))
libc = ctypes.CDLL(None, use_errno=True)
libc.prctl.argtypes = [ctypes.c_int, *[ctypes.c_void_p] * 4]
assert libc.prctl(38, 1, 0, 0, 0) == 0  # PR_SET_NO_NEW_PRIVS
assert libc.prctl(22, 2, program, 0, 0) == 0  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER
assert libc.syscall(NUMBER, 1, 0, 0) == -1 and ctypes.get_errno() == errno.EINVAL
grace_period()
"""


def test_a_grace_period_needs_no_membarrier() -> None:
    subprocess.run([sys.executable, "-c", CHILD], check=True, timeout=60)
