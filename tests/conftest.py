"""Fixtures, and the rule for skipping: only where a probe failed, and never in CI."""

import os
import signal
from collections.abc import Iterator

import pytest

from tests.sandbox import Sandbox


def _missing() -> str:
    """What a kernel test needs and this machine lacks; empty if nothing."""
    if os.geteuid() != 0:
        return "not root"
    with open("/proc/self/mountinfo", encoding="utf-8") as mounts:  # noqa: PTH123
        types = {line.partition(" - ")[2].split()[0] for line in mounts}
    for kind in ("bpf", "cgroup2"):
        if kind not in types:
            return f"no {kind} filesystem is mounted"
    return ""


def pytest_configure() -> None:
    # A shell that starts this in the background has SIGINT ignored, which all inherit.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("kernel") and (missing := _missing()):
        if os.environ.get("CI") == "true":
            pytest.fail(f"a kernel test cannot run here: {missing}")
        pytest.skip(missing)


@pytest.fixture
def sandbox() -> Iterator[Sandbox]:
    with Sandbox(loopback=("10.96.0.1/32", "fd00:96::1/128")) as made:
        yield made
