"""Older kernels, such as 6.1, round the stack of each function up to 32 bytes, newer ones to 16."""

import re
import subprocess

import pytest

from sockhop.kernel.objects import object_path

pytestmark = pytest.mark.kernel

MOST = 512

# bpftool pins maps in /sys/fs/bpf, whatever it is told: let that be one of its own.
LOAD = 'mount -t bpf none /sys/fs/bpf && exec bpftool --debug prog loadall "$0" /sys/fs/bpf/it'


def stacks(name: str) -> dict[str, list[int]]:
    """Return the stack of each program of an object, and of the functions that it calls."""
    told = subprocess.run(
        ["unshare", "--mount", "sh", "-c", LOAD, object_path(name)],
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    log = re.sub(r"libbpf: (?!prog)", "", told.stdout + told.stderr)
    found = re.findall(r"prog '(\w+)': -- BEGIN.*?stack depth ([\d+]+)", log, re.DOTALL)
    return {program: list(map(int, depths.split("+"))) for program, depths in found}


def test_hooks_fit_the_stack_of_older_kernels() -> None:
    found = stacks("balance")
    assert "sockhop_connect6" in found
    # No function that a hook calls calls another one.
    for program, (own, *called) in found.items():
        rounded = [-(-depth // 32) * 32 for depth in (own, max(called, default=0))]
        assert sum(rounded) <= MOST, f"{program}: {own} + {called}"
