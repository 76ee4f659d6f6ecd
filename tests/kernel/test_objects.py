"""Every compiled object loads, on this kernel or on another (script/test-vm)."""

import shutil
from pathlib import Path

import pytest

from sockhop.kernel.objects import BpfObject, object_path
from tests.sandbox import Sandbox

pytestmark = pytest.mark.kernel

NAMES = sorted(
    path.name.split(".")[0] for path in (Path(__file__).parents[2] / "bpf").glob("*.bpf.c")
)


@pytest.mark.parametrize("name", NAMES)
def test_it_loads(sandbox: Sandbox, name: str) -> None:
    sandbox.pins.mkdir(mode=0o700)
    try:
        with BpfObject(object_path(name), pins=sandbox.pins):
            pass
    finally:
        shutil.rmtree(sandbox.pins)  # no agent has made this directory: detach would not know it
