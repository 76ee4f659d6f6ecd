"""The pinned maps of bpf/policy.h, typed."""

from contextlib import ExitStack
from enum import IntEnum, IntFlag
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from sockhop.datapath.pins import check_version, map_directory, nothing_here
from sockhop.kernel._libbpf import ffi, lib
from sockhop.kernel.btf import Codec, Layouts
from sockhop.kernel.maps import U32, U64, Map, open_pinned
from sockhop.kernel.objects import object_path

__all__ = [
    "ClientKey",
    "DenialRecord",
    "NetworkKey",
    "PolicyFlag",
    "PolicyMaps",
    "PolicyRecord",
    "PolicySetting",
    "PortKey",
    "VerdictRecord",
    "can_tell_cgroups",
]


class PolicySetting(IntEnum):
    """Indices of the map `policy_settings`."""

    WORD = 0
    LATEST = 1
    NEXT = 2
    CHECKSUM = 3
    LOST = 4


class PolicyFlag(IntFlag):
    """The low half of the word: by what clients are told."""

    SPACES = 1
    CGROUPS = 2


class ClientKey(NamedTuple):
    """Whose sockets, of an epoch; see struct policy_client."""

    netns: int
    cgroup: int
    epoch: int


class NetworkKey(NamedTuple):
    """A prefix of addresses of a set of rules; `prefixlen` counts the 32 bits of `rules`, too."""

    prefixlen: int
    rules: int
    address: bytes


class PortKey(NamedTuple):
    """A prefix of ports of a class of addresses; `port` in network order.

    `prefixlen` counts the 48 bits before the port, too.
    """

    prefixlen: int
    group: int
    protocol: int
    port: int


class VerdictRecord(NamedTuple):
    """Whether the policy with this id denies."""

    policy: int
    denied: int


class PolicyRecord(NamedTuple):
    """A policy: its name, padded with NUL, how often it has denied, whether it allows."""

    name: bytes
    denied: int
    allows: int


class DenialRecord(NamedTuple):
    """What a socket was denied last, see struct denial; `when` in ns of CLOCK_BOOTTIME.

    `policy` 0: its rules were not found. `pid` of who called, as the first namespace numbers it.
    """

    address: bytes
    when: int
    netns: int
    policy: int
    pid: int
    port: int
    protocol: int
    datagram: int


class PolicyMaps:
    """The maps of policies below a bpffs directory. They can be read without an agent."""

    def __init__(self, pins: Path) -> None:
        """Open them; NotInstalled where there are none."""
        layouts = Layouts(object_path("balance"))
        self._pins = pins
        self._stack = ExitStack()
        try:
            check_version(pins)
            self.settings: Map[int, int] = self._open("policy_settings", U32, U64)
            self.clients: Map[ClientKey, int] = self._open(
                "policy_clients", layouts.codec(ClientKey, "policy_client"), U32
            )
            self.networks: Map[NetworkKey, int] = self._open(
                "policy_networks", layouts.codec(NetworkKey, "policy_network"), U32
            )
            self.ports: Map[PortKey, VerdictRecord] = self._open(
                "policy_ports",
                layouts.codec(PortKey, "policy_port"),
                layouts.codec(VerdictRecord, "policy_verdict"),
            )
            self.policies: Map[int, PolicyRecord] = self._open(
                "policies", U32, layouts.codec(PolicyRecord, "policy")
            )
            self.denials: Map[int, DenialRecord] = self._open(
                "denials", U64, layouts.codec(DenialRecord, "denial")
            )
            """By the socket's cookie; those of long ago make room."""
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the descriptors; the maps stay pinned."""
        self._stack.close()

    def __enter__(self) -> "PolicyMaps":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def setting(self, which: PolicySetting) -> int:
        """Return a value of the map `policy_settings`."""
        return self.settings.get(which) or 0

    def _open(self, name: str, key: Codec[Any], value: Codec[Any]) -> Any:
        try:
            fd = open_pinned(map_directory(self._pins) / name)
        except FileNotFoundError:
            raise nothing_here(self._pins) from None
        return self._stack.enter_context(Map(fd, key, value))


@cache
def can_tell_cgroups() -> bool:
    """Whether the hooks can tell in which cgroup a socket was made.

    Linux kernel commit a35b9af4ec2c ("bpf: Add a kfunc for generic type cast") (in v6.2).
    """
    kernel = lib.btf__load_vmlinux_btf()
    if kernel == ffi.NULL:
        return False
    try:
        return int(lib.btf__find_by_name_kind(kernel, b"bpf_rdonly_cast", lib.BTF_KIND_FUNC)) > 0
    finally:
        lib.btf__free(kernel)
