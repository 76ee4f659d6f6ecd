"""A virtual machine that boots a kernel, runs pytest and ends: QEMU, without KVM."""

import json
import os
import re
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from tests.vm.image import build_image
from tests.vm.kernels import Kernel

__all__ = ["Report", "read_report", "run_tests"]

_QEMU = (
    "qemu-system-x86_64", "-machine", "q35", "-accel", "tcg,thread=multi", "-cpu", "max",
    "-smp", "2", "-m", "1536M", "-nographic", "-no-reboot", "-nodefaults", "-monitor", "none",
    "-serial", "stdio",
)  # fmt: skip
_COMMAND_LINE = "console=ttyS0 panic=-1 quiet mitigations=off"
_BOOT = 150
"""Seconds in which a machine gets as far as pytest, on a slow host."""
_BOOTS = 3
_BEGUN = b"BEGIN\r\n"
_OUTCOME = re.compile(r"^(\S+::\S.*?) (PASSED|FAILED|ERROR|SKIPPED)\b(.*)$")
_MESSAGE = re.compile(r"^(?:FAILED|ERROR) (\S+::\S.*?) - (.*)$", re.MULTILINE)


class Report(NamedTuple):
    """What pytest said: each test with its outcome, and all that came on the console."""

    outcomes: dict[str, str]
    status: int | None
    console: str
    lacking: dict[str, str]
    """The features that `sockhop features` did not find there, with what their probes met."""
    messages: dict[str, str]
    """What pytest's summary says of tests that did not pass."""

    def failures(self) -> list[str]:
        """Return the tests that did not pass, skipped ones too."""
        return [name for name, outcome in self.outcomes.items() if outcome != "PASSED"]


def _watched(command: Sequence[str], console: Path, seconds: float) -> bytes:
    """Run the machine to its end; return what came on its console. One that hangs is ended."""
    begin = time.monotonic()
    with console.open("wb") as out:
        machine = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out)
        try:
            while machine.poll() is None:
                time.sleep(1)
                elapsed = time.monotonic() - begin
                booted = elapsed < _BOOT or _BEGUN in console.read_bytes()
                if elapsed > seconds or not booted:
                    break
        finally:
            machine.kill()
            machine.wait()
    return console.read_bytes()


def run_tests(kernel: Kernel, arguments: str, *, seconds: float = 900) -> Report:
    """Boot *kernel* and run pytest with *arguments* there; a machine that hangs is ended.

    One that does not get as far as pytest is booted again: under load, QEMU loses timer interrupts.
    """
    with tempfile.TemporaryDirectory(prefix="sockhop-test-vm-") as directory:
        image = Path(directory) / "initramfs"
        build_image(image, kernel, arguments)
        command = [*_QEMU, "-kernel", str(kernel.image), "-initrd", str(image),
                   "-append", _COMMAND_LINE]  # fmt: skip
        console = b""
        for _ in range(_BOOTS):
            console = _watched(command, Path(directory) / "console", seconds)
            if _BEGUN in console:
                break
    text = console.decode(errors="replace").replace("\r", "")
    if log := os.environ.get("SOCKHOP_VM_LOG"):
        Path(log).joinpath(f"{kernel.release}.log").write_text(text)
    return read_report(text)


def read_report(text: str) -> Report:
    """Return what a machine's console, without carriage returns, says."""
    begun, _, told = text.partition("BEGIN\n")
    outcomes = {match[1]: match[2] for line in told.splitlines() if (match := _OUTCOME.match(line))}
    ended = re.search(r"^END (\d+)$", told, re.MULTILINE)
    features = re.search(r"FEATURES (\{.*\})$", begun, re.MULTILINE)
    listed = json.loads(features[1])["features"] if features else []
    lacking = {each["name"]: each["reason"] for each in listed if not each["available"]}
    messages = {match[1]: match[2] for match in _MESSAGE.finditer(told)}
    return Report(outcomes, int(ended[1]) if ended else None, text, lacking, messages)
