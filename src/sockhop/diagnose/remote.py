"""Dials from elsewhere: runs sockhop there behind a command such as ssh, or else curl."""

import json
import shlex
import subprocess
from collections import Counter
from collections.abc import Sequence

from sockhop.diagnose.dial import Dialling, Question, Result
from sockhop.errors import InputError

__all__ = ["dial_remotely"]

_PATIENCE = 20.0
"""Seconds for the way there and the start of a program, beside those for the connections."""
_FEW = 5
_REFUSED, _TIMEOUT, _EMPTY, _RECEIVING = 7, 28, 52, 56
"""Exit statuses of curl(1): what came of a connection. Others say that it was never tried."""


def dial_remotely(prefix: Sequence[str], question: Question) -> Dialling:
    """Dial where *prefix*, a command that runs the command which follows, leads to.

    It runs there `sockhop doctor`, else `curl` a few times: with root or without. InputError if
    neither can be run. Nothing of *question* means anything to a shell: ssh gives it to one.
    """
    name = f"remote ({shlex.join(prefix)})"
    milliseconds = max(1, round(question.timeout * 1000))
    asked = ["--http", question.path] if question.path else []
    options = ("--count", str(question.count), "--timeout", f"{milliseconds}ms", "--alone")
    told = _run(
        [*prefix, "sockhop", "doctor", question.name, *asked, *options, "-o", "json"],
        question.count * question.timeout * 2,
    )
    try:
        (row,) = json.loads(told.stdout)["dialled"]
        results = Counter({Result(result): n for result, n in row["results"].items()})
    except (ValueError, KeyError, TypeError):
        results = Counter(_curl(prefix, question) for _ in range(min(question.count, _FEW)))
    return Dialling.of(name, results)


def _curl(prefix: Sequence[str], question: Question) -> Result:
    scheme = "http" if question.path else "telnet"
    seconds = f"{question.timeout:.3f}"
    # Only -v says whether a connection was refused.
    curl = ("curl", "-sv", "-g", "-o", "/dev/null", "-w", "%{time_connect}", "-m", seconds)
    url = f"{scheme}://{question.name}{question.path}"
    told = _run([*prefix, *curl, url], question.timeout)
    if told.returncode not in (0, _REFUSED, _TIMEOUT, _EMPTY, _RECEIVING):
        said = (told.stderr.strip() or told.stdout.strip()).splitlines()
        raise InputError(
            f"--remote {shlex.join(prefix)}: neither sockhop nor curl runs there: "
            f"{said[-1] if said else f'exit status {told.returncode}'}",
            hint="for example --remote 'ssh node2'",
        )
    connected = told.stdout.strip() not in ("", "0", "0.000000")
    if told.returncode == _REFUSED:
        return Result.REFUSED if "refused" in told.stderr else Result.UNREACHABLE
    if not connected:
        return Result.TIMEOUT
    if not question.path:
        return Result.CONNECTED
    return {0: Result.ANSWERED, _TIMEOUT: Result.SILENT}.get(told.returncode, Result.CLOSED)


def _run(command: Sequence[str], seconds: float) -> "subprocess.CompletedProcess[str]":
    try:
        return subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
            stdin=subprocess.DEVNULL,
            timeout=seconds + _PATIENCE,
        )
    except FileNotFoundError:
        raise InputError(f"--remote: there is no command {command[0]!r}") from None
    except (OSError, subprocess.TimeoutExpired) as error:
        raise InputError(f"--remote {command[0]}: {error}") from None
