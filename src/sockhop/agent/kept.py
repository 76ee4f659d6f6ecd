"""Small files beside the agent's socket: what the next agent has to know, about these maps."""

import os
from contextlib import suppress
from pathlib import Path

from sockhop.datapath.balancer import map_directory
from sockhop.kernel.maps import map_info, open_pinned

__all__ = ["maps_epoch", "replace_file"]

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def replace_file(path: Path, data: bytes) -> None:
    """Write *data* to *path*, for root alone; readers meet the old file or the new one."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.new")
    aside.unlink(missing_ok=True)
    fd = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(fd, "wb") as file:
        file.write(data)
    aside.replace(path)


def maps_epoch(pins: Path) -> str:
    """Name the maps below *pins*: their ids are given anew after a boot.

    FileNotFoundError where nothing is installed.
    """
    boot = ""  # in a sandbox without /proc/sys; /run is empty after a boot anyway
    with suppress(OSError):
        boot = _BOOT_ID.read_text().strip()
    fd = open_pinned(map_directory(pins) / "settings")
    try:
        return f"{boot}/{map_info(fd).id}"
    finally:
        os.close(fd)
