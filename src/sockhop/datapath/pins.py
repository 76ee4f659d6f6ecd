"""Where our maps and links are pinned, below a bpffs directory."""

from pathlib import Path

from sockhop.errors import SystemLackError

__all__ = ["NotInstalled", "link_directory", "map_directory", "nothing_here"]


class NotInstalled(SystemLackError):
    """There are no maps of ours in the bpffs directory."""


def map_directory(pins: Path) -> Path:
    """Return where the maps are pinned, given the bpffs directory."""
    return pins / "maps"


def link_directory(pins: Path) -> Path:
    """Return where the links are pinned, given the bpffs directory."""
    return pins / "links"


def nothing_here(pins: Path) -> NotInstalled:
    """Return what to say where no agent has been."""
    return NotInstalled(
        f"{pins}: nothing is installed here",
        hint="start an agent with `sockhop agent -f services.yaml`, "
        "or name its directory with --bpffs (SOCKHOP_BPFFS)",
    )
