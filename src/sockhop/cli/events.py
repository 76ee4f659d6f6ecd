"""`sockhop events`."""

import sys
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import click
import msgspec

from sockhop.cli.options import api_path, global_options, output_option
from sockhop.cli.output import print_value

if TYPE_CHECKING:
    from sockhop.agent.events import Event

__all__ = ["command", "event_text", "print_event"]

_RECENT = 10


@click.command(epilog="Example: sockhop events -f")
@click.option("-f", "--follow", is_flag=True, help="Go on with what happens from now on.")
@click.option(
    "-n",
    "--last",
    type=click.IntRange(min=0),
    metavar="N",
    help="Only the last N events (with -f by default the last 10, else all).",
)
@output_option
@global_options
def command(follow: bool, last: int | None, output: str) -> int:
    """List which sockets were ended or moved, why, and by which change.

    What the agent did and what was done by hand; and what was found to harm connections. Works
    without an agent. The file is bounded: the oldest events go. With -f and -o json each event is
    one line. Exit status 1 if there is none.
    """
    from sockhop.agent.events import EventLog, events_path  # noqa: PLC0415

    log = EventLog(events_path(api_path()))
    if follow:
        for event in log.follow(_RECENT if last is None else last):
            print_event(event, output)
    found = list(log.read())
    if last is not None:
        found = found[max(len(found) - last, 0) :]
    if output in ("json", "yaml"):
        print_value(found, output)
    else:
        for event in found:
            print_event(event, output)
        if not found:
            click.echo(f"there are no events in {log.path}", err=True)
    return int(not found)


def print_event(event: "Event", output: str) -> None:
    """Print *event* as *output* says: a line, or a document of YAML."""
    if output == "json":
        line = msgspec.json.encode(event).decode()
    elif output == "yaml":
        import yaml  # noqa: PLC0415 (only here, and slow to import)

        line = yaml.safe_dump(msgspec.to_builtins(event), explicit_start=True, sort_keys=False)
    else:
        line = event_text(event, wide=output == "wide")
    click.echo(line)
    sys.stdout.flush()


def event_text(event: "Event", *, wide: bool = False) -> str:
    """Return *event* as a line; *wide*: with what identifies the socket."""
    when = datetime.fromtimestamp(event.time, UTC).isoformat(timespec="milliseconds")
    words = [when.replace("+00:00", "Z"), event.kind]
    if event.local:
        words.append(f"{event.protocol.lower()} {event.local}>{event.remote}")
        if event.processes:
            words.append(f"of {', '.join(event.processes)}")
        if wide:
            words.append(f"(cookie {event.cookie}, netns {event.netns})")
    what = event.reason
    if event.intent:
        what += f", {event.intent}"
    if event.change:
        what += f", change {event.change}"
    if event.sockets:
        what += f", {event.sockets:,} sockets" if event.sockets > 1 else ", 1 socket"
    return f"{' '.join(words)}: {what}"
