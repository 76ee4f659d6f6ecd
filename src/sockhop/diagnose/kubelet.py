"""Finds what kubelet has logged of failed probes of an address, in a bounded part of its logs."""

import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

__all__ = ["LOGS", "probe_failures"]

LOGS = (
    Path("/var/log/kubernetes/kubelet.INFO"),
    Path("/var/log/kubelet.log"),
    Path("/var/log/syslog"),
    Path("/var/log/messages"),
)
_TAIL = 1 << 20
_JOURNALS = (Path("/var/log/journal"), Path("/run/log/journal"))
_JOURNAL = ("journalctl", "-u", "kubelet", "-n", "2000", "--no-pager", "-q", "-o", "short-iso")
_SECONDS = 5
_LINE_MAX = 400


def probe_failures(target: str, logs: Sequence[Path] = LOGS, *, journal: bool = True) -> list[str]:
    """Return the lines about probes of *target*, `address:port`, oldest first in each log.

    Of each file the last MiB is looked at, of the journal the last 2,000 lines of the unit kubelet.
    """
    named = re.compile(rf"(?<![\d.]){re.escape(target)}(?!\d)")
    lines = [line for path in logs for line in _tail(path)]
    if journal:
        lines += _journal()
    return [line[:_LINE_MAX] for line in lines if "probe" in line.lower() and named.search(line)]


def _tail(path: Path) -> Iterator[str]:
    with suppress(OSError), path.open("rb") as log:
        log.seek(max(0, log.seek(0, 2) - _TAIL))
        yield from log.read(_TAIL).decode(errors="replace").splitlines()


def _journal() -> list[str]:
    if not shutil.which(_JOURNAL[0]) or not any(each.is_dir() for each in _JOURNALS):
        return []
    with suppress(OSError, subprocess.TimeoutExpired):
        done = subprocess.run(
            _JOURNAL, capture_output=True, check=False, timeout=_SECONDS, stdin=subprocess.DEVNULL
        )
        return done.stdout.decode(errors="replace").splitlines()
    return []
