"""`sockhop demo`."""

import os
import shutil
import signal
import subprocess
from pathlib import Path

import click

from sockhop.cli.options import bpffs_path, cgroup_path, global_options
from sockhop.errors import SystemLackError

__all__ = ["command"]

_BPFFS = Path("/sys/fs/bpf")
_TOOLS = {"curl": "curl", "ip": "iproute2", "ss": "iproute2", "unshare": "util-linux"}


@click.command(epilog="Example: sockhop demo stuck")
@click.argument("what", type=click.Choice(["balance", "stuck"]), default="balance")
@global_options
def command(what: str) -> int:
    """Show what sockhop does, on this kernel, in a network namespace and a cgroup of its own.

    balance, the default: two HTTP servers, a service, curl as the client; a server goes and comes
    back under a running client loop. stuck: connections that are established and hang, because of
    stale entries in somebody's sockhash; they are found and healed.

    Nothing else on this machine is touched. All is removed at the end, also after Ctrl-C. Exit
    status 1 if something was not as it should be, such as a connect of the loop that failed.

    The cgroup is made below --cgroup, the pins beside --bpffs.
    """
    from sockhop.cli.demo_play import Demo, Screen  # noqa: PLC0415 (slow to import)
    from sockhop.cli.demo_stage import Stage, StopRequested, perform  # noqa: PLC0415 (extension)
    from sockhop.cli.demo_stuck import Stuck  # noqa: PLC0415 (extension)

    _require_tools()
    _require_bpffs()
    screen = Screen()
    name = f"{bpffs_path().name}-demo"
    stage = Stage(name, cgroup_path() / name, bpffs_path().with_name(name))
    demo = (Stuck if what == "stuck" else Demo)(stage, screen)
    left: list[str] = []

    def play() -> None:
        stage.clear()  # what a demo left that was killed with SIGKILL
        with stage.built():
            demo.play()

    def clear() -> None:
        left.extend(stage.clear())
        screen.restore()

    status = 0
    with stage.claimed():
        try:
            perform(play, clear)
        except StopRequested as stop:
            screen.say(f"\nstopped by {signal.Signals(stop.number).name}")
            status = 128 + stop.number
        finally:
            if left:
                screen.say("could not be removed:", *left)
    if left:
        return status or 1
    screen.step("removed: all processes, the cgroup, the pins, the namespace, the files")
    if not status:
        screen.say(*demo.next_steps())
    return status


def _require_tools() -> None:
    if os.geteuid() != 0:
        raise SystemLackError("the demo needs root", hint="sudo script/demo")
    for tool, package in _TOOLS.items():
        if not shutil.which(tool):
            raise SystemLackError(
                f"the demo needs `{tool}`, which is not on PATH", hint=f"apt-get install {package}"
            )


def _require_bpffs() -> None:
    from sockhop.kernel.bpffs import require_bpffs  # noqa: PLC0415 (extension)
    from sockhop.kernel.mounts import filesystem_type  # noqa: PLC0415

    pins = bpffs_path()
    if _BPFFS in pins.parents and filesystem_type(_BPFFS) != "bpf":
        done = subprocess.run(
            ["mount", "-t", "bpf", "bpf", _BPFFS], check=False, capture_output=True, text=True
        )
        if done.returncode:
            raise SystemLackError(
                f"no BPF filesystem is mounted at {_BPFFS}, and mounting one failed",
                hint=done.stderr.strip(),
            )
        click.echo(f"mounted a BPF filesystem at {_BPFFS}, as systemd does at boot; it stays")
    require_bpffs(pins)
