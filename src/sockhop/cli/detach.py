"""`sockhop detach`."""

from pathlib import Path

import click

from sockhop.cli.options import api_path, bpffs_path, cgroup_path, global_options
from sockhop.cli.output import counted

__all__ = ["command"]


@click.command(epilog="Example: sockhop detach")
@global_options
def command() -> None:
    """End balancing and remove everything of ours from the kernel.

    Connections that are open go on to their backends, but getpeername() shows the backend from
    now on. Programs of others stay. Stop the agent first.

    It also ends what another version of sockhop has installed.

    Links are known by their pins, wherever they are attached. Programs of ours that were attached
    without a link are looked for in the whole cgroup hierarchy.
    """
    from sockhop.agent.listening import remove_socket  # noqa: PLC0415
    from sockhop.datapath.balancer import (  # noqa: PLC0415 (extension)
        OtherVersion,
        check_version,
        remove_pins,
    )
    from sockhop.datapath.splicer import end_splicing, stop_splicing  # noqa: PLC0415
    from sockhop.kernel.bpffs import lock_directory, require_bpffs  # noqa: PLC0415

    pins = bpffs_path()
    require_bpffs(pins)
    if not pins.is_dir():
        click.echo(f"nothing of ours is installed in {pins}")
        return
    with lock_directory(pins):
        try:
            check_version(pins)
            what = f"; {counted(_count_sockets(pins), 'live socket')}"
            spliced = end_splicing(pins, cgroup_path())
        except OtherVersion:
            what, spliced = " what another version had installed; live sockets", 0
            stop_splicing(pins, cgroup_path())
        remove_pins(pins, cgroup_path())
    remove_socket(api_path())
    click.echo(f"detached{what} left without reverse translation")
    if spliced:
        click.echo(
            f"{counted(spliced, 'socket')} with unread spliced bytes: the splice program stays "
            "with them until they are closed"
        )


def _count_sockets(pins: Path) -> int:
    from sockhop.datapath.balancer import NotInstalled  # noqa: PLC0415
    from sockhop.datapath.sockets import Sockets  # noqa: PLC0415

    try:
        with Sockets(pins) as programs:
            return len(programs.balanced())
    except NotInstalled:
        return 0
