"""The client of `sockhop demo`: curl in a loop, a new connection for every request."""

import re
import subprocess
from collections import Counter
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from sockhop.cli.demo_stage import Stage, wait_until
from sockhop.errors import SockhopError

__all__ = ["Answers", "ClientLoop"]

_BATCH = 25
_BATCHES = 1000  # a loop that nobody ends ends itself
# The file `phase` says into which file the next batch writes, and when to end.
_SCRIPT = f"""
batches={_BATCHES}
while read -r phase < phase && [ "$phase" != end ] && [ $((batches -= 1)) -ge 0 ]; do
    curl -s --max-time 5 -w ' %{{exitcode}} %{{num_connects}} %{{errormsg}}\\n' "$0" >> "$phase"
done
"""
_LINE = re.compile(r"(?:backend (\w+))? (\d+) (\d+) ?(.*)")


class Answers(NamedTuple):
    """What a phase of the loop met: connections made, answers by backend, failures by reason."""

    connects: int
    backends: Counter[str]
    failures: Counter[str]

    def __str__(self) -> str:
        by_backend = ", ".join(f"{name} {n:,}" for name, n in sorted(self.backends.items()))
        text = f"{self.connects:,} connects ({by_backend}), {self.failures.total()} failures"
        return text + "".join(f"; {n} x {reason}" for reason, n in self.failures.most_common(3))


class ClientLoop:
    """A running loop. Each batch of curl belongs to the phase that was set when it began."""

    def __init__(self, stage: Stage, url: str) -> None:
        """Start the loop in the phase `both`; every answer has to be `backend NAME`."""
        self._stage = stage
        self.phases: list[str] = []
        self.command = f"while :; do curl -s '{url}/?[1-{_BATCH}]'; done"
        self.enter("both")
        self._process = stage.start(
            "sh", "-c", _SCRIPT, f"{url}/?[1-{_BATCH}]", stderr=subprocess.DEVNULL
        )

    def enter(self, phase: str) -> None:
        """Begin a phase: what the loop does from its next batch on."""
        if phase != "end":
            self.phases.append(phase)
        self._stage.write("phase", phase + "\n")

    def wait_answers(self, wanted: int) -> None:
        """Wait until the loop has *wanted* answers, or failures, in this phase."""

        def enough() -> bool:
            if self._process.poll() is not None:
                raise SockhopError("the client loop ended too soon")
            return len(self._lines(self.phases[-1])) >= wanted

        wait_until(enough, f"the client loop had {wanted} answers", 20)

    def end(self) -> None:
        """End the loop after its batch."""
        self.enter("end")
        wait_until(lambda: self._process.poll() is not None, "the client loop ended", 20)

    def answers(self, *phases: str) -> Answers:
        """Return what *phases* met; of the latest phase only once the loop has ended."""
        connects, backends, failures = 0, Counter[str](), Counter[str]()
        for line in chain.from_iterable(self._lines(phase) for phase in phases):
            found = _LINE.fullmatch(line)
            if found is None:
                failures[f"not an answer of ours: {line}"] += 1
                continue
            name, status, made, reason = found.groups()
            connects += int(made)
            if status == "0" and name:
                backends[name] += 1
            else:
                failures[reason or f"no answer (curl: {status})"] += 1
        return Answers(connects, backends, failures)

    def _lines(self, phase: str) -> list[str]:
        path = self._path(phase)
        return path.read_text().splitlines() if path.exists() else []

    def _path(self, phase: str) -> Path:
        return self._stage.directory / phase
