"""Dials from elsewhere: runs sockhop there behind a command such as ssh, or else curl."""

import json
import re
import shlex
import subprocess
from collections import Counter
from collections.abc import Sequence
from typing import Any

from sockhop.diagnose.dial import Dialling, Question, Result
from sockhop.errors import InputError

__all__ = ["dial_remotely"]

_PATIENCE = 20.0
"""Seconds for the way there and the start of a program, beside those for the connections."""
_FEW = 5
_NOT_THERE = 255
"""The exit status of ssh(1) where it does not get there; a command's own is hardly ever this."""
_REFUSED, _TIMEOUT, _EMPTY, _RECEIVING = 7, 28, 52, 56
"""Exit statuses of curl(1): what came of a connection. Others say that it was never tried."""
_CONNECT = re.compile(r"connect=([\d.,]+)")


def dial_remotely(prefix: Sequence[str], question: Question) -> Dialling:
    """Dial where *prefix*, a command that runs the command which follows, leads to.

    It runs there `sockhop doctor`, else `curl` a few times: with root or without. InputError if
    *prefix* does not get there, does not end in time, or neither can be run. Nothing of *question*
    means anything to a shell: ssh gives it to one. What a login script prints is passed over.
    """
    name = f"remote ({shlex.join(prefix)})"
    milliseconds = max(1, round(question.timeout * 1000))
    asked = ["--http", question.path] if question.path else []
    options = ("--count", str(question.count), "--timeout", f"{milliseconds}ms", "--alone")
    told = _run(
        ["sockhop", "doctor", question.name, *asked, *options, "-o", "json"],
        prefix,
        question.count * question.timeout * 2,
    )
    try:
        (row,) = _answer(told.stdout)["dialled"]
        results = Counter({Result(result): n for result, n in row["results"].items()})
    except (ValueError, KeyError, TypeError):
        results = Counter(_curl(prefix, question) for _ in range(min(question.count, _FEW)))
    return Dialling.of(name, results)


def _answer(printed: str) -> Any:
    """Return the JSON object that begins on a line of its own, whatever stands around it."""
    text = f"\n{printed}"
    return json.JSONDecoder().raw_decode(text, text.rindex("\n{\n") + 1)[0]


def _curl(prefix: Sequence[str], question: Question) -> Result:
    scheme = "http" if question.path else "telnet"
    seconds = f"{question.timeout:.3f}"
    # Not by a proxy, nor as a .curlrc there says. Only -v tells whether a connection was refused.
    curl = ("env", "http_proxy=", "all_proxy=", "ALL_PROXY=", "curl", "-q", "-sv", "-g",
            *("-o", "/dev/null", "-w", "connect=%{time_connect}", "-m", seconds))  # fmt: skip
    url = f"{scheme}://{question.name}{question.path}"
    told = _run([*curl, url], prefix, question.timeout)
    times = _CONNECT.findall(told.stdout)
    if not times or told.returncode not in (0, _REFUSED, _TIMEOUT, _EMPTY, _RECEIVING):
        raise InputError(
            f"--remote {shlex.join(prefix)}: neither sockhop nor curl runs there: {_last(told)}",
            hint="for example --remote 'ssh node2'",
        )
    if told.returncode == _REFUSED:
        return Result.REFUSED if "refused" in told.stderr else Result.UNREACHABLE
    if not times[-1].strip("0.,"):
        return Result.TIMEOUT
    if not question.path:
        return Result.CONNECTED
    return {0: Result.ANSWERED, _TIMEOUT: Result.SILENT}.get(told.returncode, Result.CLOSED)


def _run(
    command: Sequence[str], prefix: Sequence[str], seconds: float
) -> "subprocess.CompletedProcess[str]":
    """Run a command behind *prefix*, which can ask nobody anything, for some *seconds* at most."""
    name = f"--remote {shlex.join(prefix)}"
    try:
        told = subprocess.run(
            [*prefix, *command],
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
            stdin=subprocess.DEVNULL,
            timeout=seconds + _PATIENCE,
        )
    except FileNotFoundError:
        raise InputError(f"--remote: there is no command {prefix[0]!r}") from None
    except subprocess.TimeoutExpired:
        raise InputError(
            f"{name}: it has not ended within {seconds + _PATIENCE:.0f} s",
            hint="with ssh, -o BatchMode=yes -o ConnectTimeout=5 lets it neither ask nor wait",
        ) from None
    except OSError as error:
        raise InputError(f"{name}: {error}") from None
    if told.returncode == _NOT_THERE:
        raise InputError(
            f"{name}: it does not get there: {_last(told)}",
            hint=f"it has to without being asked anything: try `{shlex.join(prefix)} true`",
        )
    return told


def _last(told: "subprocess.CompletedProcess[str]") -> str:
    said = (told.stderr.strip() or told.stdout.strip()).splitlines()
    return said[-1].strip() if said else f"exit status {told.returncode}"
