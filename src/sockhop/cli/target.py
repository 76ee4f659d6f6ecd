"""What several commands take: an address with a port, a path to ask for, a network namespace."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from sockhop.cli.options import parse_duration
from sockhop.errors import InputError

if TYPE_CHECKING:
    from sockhop.diagnose.dial import Question
    from sockhop.kernel.namespaces import Namespace

__all__ = ["dial_options", "namespace_at", "parse_question"]

F = TypeVar("F", bound=Callable[..., Any])

_HOST = "/proc/1/ns/net"
_TARGET = re.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|([0-9.]+)):(\d{1,5})")


def dial_options(
    *, http: str, origin: str, counted: str, count: int, timeout: str, also: str = ""
) -> Callable[[F], F]:
    """Add --http, --from, --count and --timeout: `http`, `origins`, `count` (default: *count*)
    and `timeout` (seconds). The others are what their help says.
    """
    options = (
        click.option("--http", metavar="PATH", help=http),
        click.option(
            *("--from", "origins"),
            multiple=True,
            metavar="NETNS",
            help=f"{origin} this network namespace, a name of `ip netns` or a path, instead of "
            "from here; may be given several times. `host`: that of the node"
            + (f"; {also}" if also else "."),
        ),
        click.option(
            "--count",
            type=click.IntRange(1, 1000),
            metavar="N",
            default=count,
            show_default=True,
            help=counted,
        ),
        click.option(
            "--timeout",
            default="1s",
            show_default=True,
            metavar="DURATION",
            callback=parse_duration,
            help=timeout,
        ),
    )

    def add(command: F) -> F:
        for option in reversed(options):
            command = option(command)
        return command

    return add


def parse_question(target: str, path: str | None, count: int, timeout: float) -> "Question":
    """Return what ADDRESS:PORT and --http ask for, *count* times, *timeout* seconds each."""
    from sockhop.diagnose.dial import Question  # noqa: PLC0415 (slow to import)
    from sockhop.model import pack_address, parse_address  # noqa: PLC0415

    found = _TARGET.fullmatch(target)
    try:
        if not found or not 0 < int(found[3]) < 1 << 16:
            raise ValueError
        address = pack_address(parse_address(found[1] or found[2]))
    except ValueError:
        raise InputError(
            f"{target!r} is no address with a port",
            hint="for example 10.0.1.7:8080 or [fd00::7]:80",
        ) from None
    if path is not None and not re.fullmatch(r"/[!-~]*", path):
        raise InputError(f"--http: {path!r} is no path", hint="for example /health")
    return Question(address, int(found[3]), path or "", count, timeout)


def namespace_at(name: str) -> "Namespace":
    """Return the network namespace that a name of `ip netns`, a path or `host` means (--from)."""
    from sockhop.kernel import netns  # noqa: PLC0415 (needs the extension)
    from sockhop.kernel.namespaces import Namespace  # noqa: PLC0415

    name = _HOST if name == "host" else name
    path = Path(name) if "/" in name else Path("/run/netns") / name
    try:
        inode = netns.inode(path)
    except OSError as error:
        raise InputError(f"--from {name}: {path}: {error.strerror}") from None
    with netns.entered(path):
        return Namespace(inode, netns.current_cookie(), path)
