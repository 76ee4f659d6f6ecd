"""Older kernels, such as 6.1, round the stack of each function up to 32 bytes, newer ones to 16."""

import ctypes
import os
import re
from pathlib import Path

import pytest

from sockhop.kernel.objects import object_path

pytestmark = pytest.mark.kernel

MOST = 512
SHORT = 4
"""BPF_LOG_STATS: what the verifier has counted, not each instruction."""
DEPTHS = re.compile(rb"stack depth ([\d+]+)")


def stacks(path: Path) -> dict[str, list[int]]:
    """Return the stack of each program of an object, and of the functions that it calls."""
    libbpf = ctypes.CDLL("libbpf.so.1", use_errno=True)
    for name in ("open_file", "next_program", "next_map"):
        getattr(libbpf, f"bpf_object__{name}").restype = ctypes.c_void_p
    libbpf.bpf_program__name.restype = ctypes.c_char_p
    opened = ctypes.c_void_p(libbpf.bpf_object__open_file(os.fsencode(path), None))
    assert opened.value, path
    try:
        found = None
        while found := libbpf.bpf_object__next_map(opened, ctypes.c_void_p(found)):
            assert libbpf.bpf_map__set_pin_path(ctypes.c_void_p(found), None) == 0
        logs = {}
        while found := libbpf.bpf_object__next_program(opened, ctypes.c_void_p(found)):
            program, log = ctypes.c_void_p(found), ctypes.create_string_buffer(1 << 16)
            libbpf.bpf_program__set_log_level(program, SHORT)
            libbpf.bpf_program__set_log_buf(program, log, ctypes.c_size_t(len(log)))
            logs[libbpf.bpf_program__name(program).decode()] = log
        assert libbpf.bpf_object__load(opened) == 0, {n: log.value for n, log in logs.items()}
        depths = {name: DEPTHS.search(log.value) for name, log in logs.items()}
        return {
            name: [int(n) for n in each[1].split(b"+")] for name, each in depths.items() if each
        }
    finally:
        libbpf.bpf_object__close(opened)


@pytest.mark.parametrize("name", ["balance", "balance.plain"])
def test_hooks_fit_the_stack_of_older_kernels(name: str) -> None:
    found = stacks(object_path(name))
    assert "sockhop_connect6" in found
    # No function that a hook calls calls another one.
    for program, (own, *called) in found.items():
        rounded = [-(-depth // 32) * 32 for depth in (own, max(called, default=0))]
        assert sum(rounded) <= MOST, f"{program}: {own} + {called}"
