"""Runs a command as `sockhop` does, but in this process: most of a command's time is its start."""

import contextlib
import io
import os
import sys
from typing import NamedTuple

from sockhop.cli import main
from tests.sandbox import Sandbox

__all__ = ["Told", "sockhop"]


class Told(NamedTuple):
    """Exit status and output of a command."""

    returncode: int
    stdout: str
    stderr: str


def sockhop(sandbox: Sandbox, *arguments: str) -> Told:
    """Run `sockhop` with *arguments*; this process is in the sandbox's namespace and cgroup."""
    out, err = io.StringIO(), io.StringIO()
    before, words = dict(os.environ), sys.argv
    os.environ.update(sandbox.environment)
    sys.argv = ["sockhop", *arguments]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main.main()
    except SystemExit as ended:
        return Told(int(ended.code or 0), out.getvalue(), err.getvalue())
    finally:
        sys.argv = words
        os.environ.clear()
        os.environ.update(before)
    raise AssertionError("main() has returned")
