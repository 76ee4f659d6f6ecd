"""What several commands take: an address with a port, a path to ask for, a network namespace."""

import re
from pathlib import Path
from typing import TYPE_CHECKING

from sockhop.errors import InputError

if TYPE_CHECKING:
    from sockhop.diagnose.dial import Question
    from sockhop.kernel.namespaces import Namespace

__all__ = ["namespace_at", "parse_question"]

_TARGET = re.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|([0-9.]+)):(\d{1,5})")


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
    """Return the network namespace that a name of `ip netns`, or a path, leads to (--from)."""
    from sockhop.kernel import netns  # noqa: PLC0415 (needs the extension)
    from sockhop.kernel.namespaces import Namespace  # noqa: PLC0415

    path = Path(name) if "/" in name else Path("/run/netns") / name
    try:
        inode = netns.inode(path)
    except OSError as error:
        raise InputError(f"--from {name}: {path}: {error.strerror}") from None
    with netns.entered(path):
        return Namespace(inode, netns.current_cookie(), path)
