"""What matters of the host apart from what its kernel can do: capabilities, limits."""

import os
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

from sockhop.kernel.probe import memlock_is_charged

__all__ = ["CAPABILITIES", "Capability", "Fact", "host_facts", "missing_capabilities"]


class Capability(NamedTuple):
    """A capability that sockhop uses: its bit (include/uapi/linux/capability.h), and for what."""

    bit: int
    used_for: str


CAPABILITIES = {
    "CAP_BPF": Capability(39, "load programs, make maps"),
    "CAP_NET_ADMIN": Capability(12, "programs for cgroups"),
    "CAP_PERFMON": Capability(38, "programs that the verifier takes, iterators"),
    "CAP_SYS_PTRACE": Capability(19, "`get sockets`: processes of others"),
}


class Fact(NamedTuple):
    """Something about the host, for people to read."""

    name: str
    value: str


def host_facts() -> list[Fact]:
    """Return what else matters of this host."""
    system = os.uname()
    return [
        Fact("kernel", system.release),
        Fact("architecture", system.machine),
        Fact("capabilities", _capabilities()),
        Fact("net.core.optmem_max", _optmem()),
        Fact("RLIMIT_MEMLOCK", _memlock()),
    ]


def missing_capabilities(names: Collection[str] = CAPABILITIES.keys()) -> list[str]:
    """Return which of *names* (of `CAPABILITIES`) this thread's effective set lacks."""
    status = Path("/proc/thread-self/status").read_text()
    held = int(status.partition("\nCapEff:")[2].split(maxsplit=1)[0], 16)
    return [name for name in names if not held >> CAPABILITIES[name].bit & 1]


def _capabilities() -> str:
    missing = missing_capabilities()
    held = [name for name in CAPABILITIES if name not in missing]
    lacks = [f"no {name} ({CAPABILITIES[name].used_for})" for name in missing]
    return ", ".join(held + lacks)


def _optmem() -> str:
    # Socket storage is charged to it (net/core/bpf_sk_storage.c).
    try:
        value = int(Path("/proc/sys/net/core/optmem_max").read_text())
    except (OSError, ValueError):
        return "unknown in this network namespace"
    return f"{value} bytes a socket, for its provenance among others"


def _memlock() -> str:
    if missing_capabilities({"CAP_BPF"}):
        return "needs root"
    if memlock_is_charged():
        return "limits BPF maps: make it infinity"
    return "does not limit BPF maps"
