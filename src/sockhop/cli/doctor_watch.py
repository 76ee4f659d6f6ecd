"""`sockhop doctor --watch`."""

import time
from itertools import count

import click

from sockhop.cli.events import print_event
from sockhop.cli.output import counted

__all__ = ["watch"]


def watch(every: float, looks: int | None, output: str) -> int:
    """Print what begins to harm connections and what is over, until interrupted.

    *every*: seconds between two looks; *looks*: so many of them, then stop. Returns 1 if at the end
    something harms connections, else 0.
    """
    from sockhop.agent.watching import change_events  # noqa: PLC0415 (slow to import)
    from sockhop.diagnose.watch import Watch  # noqa: PLC0415

    with Watch() as watching:
        for number in count(1):
            for event in change_events(watching.look()):
                print_event(event, output)
            if number == looks:
                break
            time.sleep(every)
        if not watching.findings and output in ("table", "wide"):
            click.echo(f"nothing was found in {counted(number, 'look')}")
    return int(bool(watching.findings))
