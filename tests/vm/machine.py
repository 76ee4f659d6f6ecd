"""A virtual machine that boots a kernel, runs pytest and ends: QEMU, without KVM."""

import json
import os
import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

from tests.vm.image import build_image
from tests.vm.kernels import Kernel

__all__ = ["Report", "run_tests"]

_QEMU = (
    "qemu-system-x86_64", "-machine", "q35", "-accel", "tcg,thread=multi", "-cpu", "max",
    "-smp", "2", "-m", "1536M", "-nographic", "-no-reboot", "-nodefaults", "-monitor", "none",
    "-serial", "stdio",
)  # fmt: skip
_COMMAND_LINE = "console=ttyS0 panic=-1 quiet mitigations=off"
_OUTCOME = re.compile(r"^(\S+::\S.*?) (PASSED|FAILED|ERROR|SKIPPED)\b(.*)$")


class Report(NamedTuple):
    """What pytest said: each test with its outcome, and all that came on the console."""

    outcomes: dict[str, str]
    status: int | None
    console: str
    lacking: frozenset[str]
    """The features that `sockhop features` did not find there."""

    def failures(self) -> list[str]:
        """Return the tests that did not pass, skipped ones too."""
        return [name for name, outcome in self.outcomes.items() if outcome != "PASSED"]


def run_tests(kernel: Kernel, arguments: str, *, seconds: float = 900) -> Report:
    """Boot *kernel* and run pytest with *arguments* there; a machine that hangs is ended."""
    with tempfile.TemporaryDirectory(prefix="sockhop-test-vm-") as directory:
        image = Path(directory) / "initramfs"
        build_image(image, kernel, arguments)
        command = [*_QEMU, "-kernel", str(kernel.image), "-initrd", str(image),
                   "-append", _COMMAND_LINE]  # fmt: skip
        try:
            done = subprocess.run(
                command, stdin=subprocess.DEVNULL, capture_output=True, timeout=seconds, check=False
            )
            console = done.stdout
        except subprocess.TimeoutExpired as error:
            console = error.stdout or b""
    text = console.decode(errors="replace").replace("\r", "")
    if log := os.environ.get("SOCKHOP_VM_LOG"):
        Path(log).joinpath(f"{kernel.release}.log").write_text(text)
    begun, _, told = text.partition("BEGIN\n")
    outcomes = {match[1]: match[2] for line in told.splitlines() if (match := _OUTCOME.match(line))}
    ended = re.search(r"^END (\d+)$", told, re.MULTILINE)
    features = re.search(r"FEATURES (\{.*\})$", begun, re.MULTILINE)
    listed = json.loads(features[1])["features"] if features else []
    lacking = frozenset(each["name"] for each in listed if not each["available"])
    return Report(outcomes, int(ended[1]) if ended else None, text, lacking)
