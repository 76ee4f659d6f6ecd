"""What no kernel of these tests would refuse, but an older one does."""

import json
import re
import subprocess

import pytest

from sockhop.kernel.objects import object_path

pytestmark = pytest.mark.unit

OBJECTS = sorted(object_path("balance").parent.glob("*.bpf.o"))
# BPF_STX | BPF_ATOMIC of 4 or 8 bytes: a plain add has 0 as its last four bytes, and what came with
# Linux 5.12 has not.
ATOMIC = re.compile(r"^ *[0-9a-f]+:\t(?:c3|db) .. .. .. (.. .. .. ..)", re.MULTILINE)


def atomics(name: str) -> set[str]:
    """Return the last four bytes of the atomic instructions of an object."""
    done = subprocess.run(
        ["llvm-objdump", "-d", object_path(name)],
        check=True, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    return set(ATOMIC.findall(done.stdout))


@pytest.mark.parametrize("name", ["balance", "sockets"])
def test_the_plain_build_has_no_atomics_that_fetch(name: str) -> None:
    assert atomics(name) > {"00 00 00 00"}
    assert atomics(f"{name}.plain") == {"00 00 00 00"}


@pytest.mark.parametrize("path", OBJECTS, ids=lambda path: path.name)
def test_no_section_is_without_variables(path: object) -> None:
    """5.10 refuses an object's BTF then, and with it its socket storage."""
    done = subprocess.run(
        ["bpftool", "-j", "btf", "dump", "file", str(path)],
        check=True, capture_output=True, timeout=60,
    )  # fmt: skip
    sections = [each for each in json.loads(done.stdout)["types"] if each["kind"] == "DATASEC"]
    assert sections
    assert all(each["vars"] for each in sections), sections
