"""`sockhop bypass on|off`."""

import click

from sockhop.cli.options import bpffs_path, global_options

__all__ = ["command"]


@click.command(epilog="Example: sockhop bypass on")
@click.argument("switch", type=click.Choice(["on", "off"]))
@global_options
def command(switch: str) -> None:
    """Let every connect pass untouched, at once: the emergency switch.

    It holds until `bypass off`, across restarts of the agent. Connections that are open go on;
    getpeername() shows their backend meanwhile.
    """
    from sockhop.datapath.balancer import BalanceMaps  # noqa: PLC0415 (needs the extension)
    from sockhop.datapath.records import Setting  # noqa: PLC0415

    with BalanceMaps(bpffs_path()) as maps:
        maps.settings.set(Setting.BYPASS, int(switch == "on"))
    click.echo(
        "bypass is on: nothing is balanced" if switch == "on" else "bypass is off: balancing again"
    )
