"""Where our maps and links are pinned, below a bpffs directory."""

from pathlib import Path

from sockhop.datapath.records import ABI, Setting
from sockhop.errors import SystemLackError
from sockhop.kernel.maps import U32, U64, Map, open_pinned

__all__ = [
    "NotInstalled",
    "OtherVersion",
    "check_version",
    "is_pinned",
    "link_directory",
    "map_directory",
    "nothing_here",
]


class NotInstalled(SystemLackError):
    """There are no maps of ours in the bpffs directory."""


class OtherVersion(SystemLackError):
    """The maps in the bpffs directory are of a version of ours whose maps differ."""


def map_directory(pins: Path) -> Path:
    """Return where the maps are pinned, given the bpffs directory."""
    return pins / "maps"


def link_directory(pins: Path) -> Path:
    """Return where the links are pinned, given the bpffs directory."""
    return pins / "links"


def is_pinned(pins: Path, name: str) -> bool:
    """Return whether there is a map of ours; SystemLackError where the caller may not know."""
    path = map_directory(pins) / name
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise SystemLackError(
            f"{path}: {error.strerror}", hint="run as root, or name another directory with --bpffs"
        ) from None
    return True


def nothing_here(pins: Path) -> NotInstalled:
    """Return what to say where no agent has been."""
    return NotInstalled(
        f"{pins}: nothing is installed here",
        hint="start an agent with `sockhop agent -f services.yaml`, "
        "or name its directory with --bpffs (SOCKHOP_BPFFS)",
    )


def check_version(pins: Path) -> None:
    """Raise OtherVersion where what is installed below *pins* is not as this version has it.

    Every version has the map `settings`, and its ABI number in it. That there is none is fine.
    """
    try:
        settings = Map(open_pinned(map_directory(pins) / "settings"), U32, U64)
    except FileNotFoundError:
        return
    with settings:
        found = settings.get(Setting.ABI)
    if found not in (0, ABI):
        raise OtherVersion(
            f"{pins}: this was installed by another version of sockhop: "
            f"its maps have the ABI {found}, those of this version {ABI}",
            hint="it works on without an agent, or with that version's. To change over, "
            "`sockhop detach` and then start the agent: in between nothing is balanced, and open "
            "connections become unmanaged",
        )
