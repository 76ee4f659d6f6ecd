"""bpftool as oracle: what the kernel has, decoded without any code of ours but bpf/sockhop.h."""

import json
import socket
import struct
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

__all__ = [
    "Attached",
    "address_of",
    "attached",
    "bpftool",
    "live_counts",
    "map_entries",
    "map_ids",
    "netns_cookie",
    "programs_with",
]


_SO_NETNS_COOKIE = 71


class Attached(NamedTuple):
    """A program on a cgroup, as `bpftool cgroup show` names it."""

    id: int
    attach_type: str
    name: str


def bpftool(*arguments: str) -> Any:
    """Run `bpftool -j` and return its answer."""
    result = subprocess.run(
        ["bpftool", "-j", *arguments], capture_output=True, text=True, timeout=60, check=False
    )
    assert result.returncode == 0, f"bpftool {arguments}: {result.stdout}{result.stderr}"
    return json.loads(result.stdout) if result.stdout.strip() else []


def map_entries(pins: Path, name: str) -> list[tuple[Any, Any]]:
    """Return the keys and values of a pinned map, as its BTF formats them."""
    entries = bpftool("map", "dump", "pinned", str(pins / "maps" / name))
    # What went while the others were read has an error for a value.
    found = [entry["formatted"] for entry in entries if "formatted" in entry]
    return [(each["key"], each["value"]) for each in found]


def live_counts(pins: Path) -> dict[tuple[int, int, int], int]:
    """Return the live sockets by (netns cookie, service id, backend id), those above 0 only."""
    return {
        (key["netns"], key["service"], key["backend"]): count
        for key, count in map_entries(pins, "live")
        if count
    }


def address_of(words: list[int]) -> str:
    """Return the text of `__be32 address[4]`, whose words bpftool prints in host order."""
    packed = struct.pack("=4I", *words)
    if packed[:12] == b"\0" * 10 + b"\xff\xff":
        return socket.inet_ntop(socket.AF_INET, packed[12:])
    return socket.inet_ntop(socket.AF_INET6, packed)


def attached(cgroup: Path) -> set[Attached]:
    """Return the programs attached to the cgroup itself."""
    shown = bpftool("cgroup", "show", str(cgroup))
    return {Attached(p["id"], p["attach_type"], p["name"]) for p in shown}


def map_ids(pins: Path) -> set[int]:
    """Return the ids of all maps pinned in `maps/`."""
    return {bpftool("map", "show", "pinned", str(pin))["id"] for pin in (pins / "maps").iterdir()}


def programs_with(maps: set[int]) -> set[int]:
    """Return the ids of all loaded programs that use one of *maps*: that makes them ours."""
    return {p["id"] for p in bpftool("prog", "show") if maps & set(p.get("map_ids", ()))}


def netns_cookie() -> int:
    """Return the cookie of this thread's network namespace, as its sockets tell it."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        cookie = probe.getsockopt(socket.SOL_SOCKET, _SO_NETNS_COOKIE, 8)
    return int(struct.unpack("=Q", cookie)[0])
