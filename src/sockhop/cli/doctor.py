"""`sockhop doctor`."""

import re
from pathlib import Path
from typing import TYPE_CHECKING

import click

from sockhop.cli.options import bpffs_path, global_options, output_option, parse_duration
from sockhop.cli.output import Column, counted, print_rows, print_value
from sockhop.errors import InputError

if TYPE_CHECKING:
    from sockhop.diagnose.doctor import Diagnosis, Origin

__all__ = ["command"]

_TARGET = re.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|([0-9.]+)):(\d{1,5})")
_COLUMNS = (
    Column("FROM", "origin"),
    Column("CONNECTIONS", "attempts"),
    Column("FAILED", "failed"),
    Column("PERCENT", "percent"),
    Column(
        "RESULTS",
        "results",
        text=lambda found: ", ".join(f"{n} {result}" for result, n in found.items()),
    ),
)


@click.command(epilog="Example: sockhop doctor 10.0.1.7:8080 --http /health")
@click.argument("target", metavar="ADDRESS:PORT", required=False)
@click.option("--http", metavar="PATH", help="Ask for this path on each connection.")
@click.option(
    "--from",
    "origins",
    multiple=True,
    metavar="NETNS",
    help="Dial from this network namespace, a name of `ip netns` or a path, instead of from here; "
    "may be given several times.",
)
@click.option(
    "--count",
    type=click.IntRange(1, 1000),
    default=5,
    show_default=True,
    help="Connections from each place.",
)
@click.option(
    "--timeout",
    default="1s",
    show_default=True,
    metavar="DURATION",
    callback=parse_duration,
    help="How long a connection, and an answer, may take.",
)
@click.option(
    "--watch",
    "watching",
    is_flag=True,
    help="Go on looking whether any connection of this node is harmed; dials nothing.",
)
@click.option(
    "--every",
    default="10s",
    show_default=True,
    metavar="DURATION",
    callback=parse_duration,
    help="Time between two looks of --watch.",
)
@click.option("--looks", type=click.IntRange(2), metavar="N", help="Stop --watch after N looks.")
@output_option
@global_options
def command(  # noqa: PLR0913, PLR0917 (click passes them by name)
    target: str | None,
    http: str | None,
    origins: tuple[str, ...],
    count: int,
    timeout: float,
    watching: bool,
    every: float,
    looks: int | None,
    output: str,
) -> int:
    """Say why connections to a TCP address fail or hang.

    Makes fresh connections, as a health check does, with a request on each if --http is given;
    looks at both ends of one that hangs, at the server's queue, at sockmaps, at our own services;
    and says what is wrong, what shows it and what to do. Exit status 1 if a connection fails.

    With --watch it tells what begins to harm connections of this node, and what is over, as the
    agent does by itself (`sockhop agent --watch-every`, `sockhop status`, `sockhop events`).
    Something counts when two looks in a row have seen it. Exit status 1 if it harms at the end.
    """
    if watching:
        if target or http or origins:
            raise InputError("--watch looks at the whole node: no address goes with it")
        from sockhop.cli.doctor_watch import watch  # noqa: PLC0415 (slow to import)

        return watch(every, looks, output)
    if target is None:
        raise InputError("which address? ADDRESS:PORT, or --watch for the whole node")
    from sockhop.diagnose.doctor import diagnose  # noqa: PLC0415 (slow to import)

    found = diagnose(
        _target(target),
        _origins(origins),
        bpffs_path(),
        request=_request(http, target),
        count=count,
        timeout=timeout,
    )
    if output in ("json", "yaml"):
        print_value(found, output)
    else:
        _print(found, output)
    return int(any(each.failed for each in found.dialled))


def _target(text: str) -> tuple[bytes, int]:
    from sockhop.model import pack_address, parse_address  # noqa: PLC0415

    found = _TARGET.fullmatch(text)
    try:
        if not found or not 0 < int(found[3]) < 1 << 16:
            raise ValueError
        return pack_address(parse_address(found[1] or found[2])), int(found[3])
    except ValueError:
        raise InputError(
            f"{text!r} is no address with a port", hint="for example 10.0.1.7:8080 or [fd00::7]:80"
        ) from None


def _request(path: str | None, target: str) -> bytes:
    if path is None:
        return b""
    if not re.fullmatch(r"/[!-~]*", path):
        raise InputError(f"--http: {path!r} is no path", hint="for example /health")
    lines = (f"GET {path} HTTP/1.1", f"Host: {target}", "Connection: close", "", "")
    return "\r\n".join(lines).encode()


def _origins(names: tuple[str, ...]) -> "list[Origin]":
    from sockhop.diagnose.doctor import Origin  # noqa: PLC0415
    from sockhop.kernel import netns  # noqa: PLC0415
    from sockhop.kernel.namespaces import Namespace  # noqa: PLC0415

    found = [] if names else [Origin("here", None)]
    for name in names:
        path = Path(name) if "/" in name else Path("/run/netns") / name
        try:
            inode = netns.inode(path)
        except OSError as error:
            raise InputError(f"--from {name}: {path}: {error.strerror}") from None
        with netns.entered(path):
            found.append(Origin(name, Namespace(inode, netns.current_cookie(), path)))
    return found


def _print(found: "Diagnosis", output: str) -> None:
    owners = ", ".join(map(str, found.owners[:5])) + (", ..." if len(found.owners) > 5 else "")
    if found.owners:
        click.echo(f"{found.target} is an address of network namespace {owners}")
    elif not found.loopback:
        click.echo(f"{found.target} is an address of no network namespace of this node")
    print_rows(found.dialled, _COLUMNS, output)
    for each in found.conclusions:
        click.echo(f"\n{each.cause} (from {each.origin})\n  {each.because}\n  do: {each.advice}")
    if not any(each.failed for each in found.dialled):
        number = sum(each.attempts for each in found.dialled)
        click.echo(f"\nnothing is wrong: {counted(number, 'connection')} of {number:,} succeed")
