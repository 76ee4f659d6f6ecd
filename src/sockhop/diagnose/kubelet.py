"""Finds what kubelet has logged of failed probes of an address, in a bounded part of its logs."""

import re
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

__all__ = ["LOGS", "probe_failures"]

LOGS = (
    Path("/var/log/kubernetes/kubelet.INFO"),
    Path("/var/log/kubelet.log"),
    Path("/var/lib/rancher/rke2/agent/logs/kubelet.log"),
    Path("/var/log/syslog"),
    Path("/var/log/messages"),
)
_TAIL = 1 << 20
_JOURNALS = (Path("/var/log/journal"), Path("/run/log/journal"))
_UNITS = ("kubelet", "k3s", "k3s-agent", "k0scontroller", "k0sworker",
          "snap.microk8s.daemon-kubelite")  # fmt: skip
"""In whose journal kubelet writes: its own unit's, or that of the program it is a part of."""
_JOURNAL = ("journalctl", "-n", "2000", "--no-pager", "-q", "-o", "short-iso")
_SECONDS = 5
_LINE_MAX = 400
_LOGGER = re.compile(r"^.{,120}?\[\d+\]: ")
"""What syslog and the journal put before a line: `Nov 21 15:50:02 node1 kubelet[2931]: `."""


def probe_failures(target: str, logs: Sequence[Path] | None = None) -> list[str]:
    """Return the lines about probes of *target*, `address:port`, oldest first in each log.

    *logs*: files, and journals (directories, or files that end in .journal); None: where kubelet's
    log usually is. Of each file the last MiB is looked at, of a journal the last 2,000 lines of
    the units that kubelet may be in. What cannot be read has no lines. A line that is in several
    logs counts once: where rsyslog runs, the journal's are in its files, too.
    """
    named = re.compile(rf"(?<![\d.]){re.escape(target)}(?!\d)")
    lines = [line for path in (LOGS if logs is None else logs) for line in _lines(path)]
    if logs is None and any(each.is_dir() for each in _JOURNALS):
        lines += _journal()
    found: dict[str, str] = {}
    for line in lines:
        if "probe" in line.lower() and named.search(line):
            found.setdefault(_LOGGER.sub("", line), line[:_LINE_MAX])
    return list(found.values())


def _lines(path: Path) -> Iterable[str]:
    if path.is_dir():
        return _journal("--directory", str(path))
    return _journal("--file", str(path)) if path.suffix == ".journal" else _tail(path)


def _tail(path: Path) -> Iterator[str]:
    with suppress(OSError), path.open("rb") as log:
        log.seek(max(0, log.seek(0, 2) - _TAIL))
        yield from log.read(_TAIL).decode(errors="replace").splitlines()


def _journal(*where: str) -> list[str]:
    units = [word for each in _UNITS for word in ("-u", each)]
    with suppress(OSError, subprocess.TimeoutExpired):
        done = subprocess.run(
            [*_JOURNAL, *units, *where],
            capture_output=True,
            check=False,
            timeout=_SECONDS,
            stdin=subprocess.DEVNULL,
        )
        return done.stdout.decode(errors="replace").splitlines()
    return []
