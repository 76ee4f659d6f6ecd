"""The splice programs, their pinned maps and the sockets that are in the sockhash."""

import os
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

from sockhop.datapath.attachment import Owner, attach_hooks, detach_hooks, programs_in_force
from sockhop.datapath.balancer import NotInstalled, link_directory, map_directory
from sockhop.datapath.pins import is_pinned
from sockhop.datapath.sockets import TCP_STATES, read_iterator
from sockhop.datapath.splice_records import (
    SpliceCounters,
    SpliceKey,
    SpliceLane,
    SpliceOwner,
    SplicePlace,
    SplicePolicy,
    SpliceReason,
    SpliceRecord,
    SpliceSetting,
)
from sockhop.kernel._libbpf import lib
from sockhop.kernel.btf import Codec, Layouts
from sockhop.kernel.cgroups import AttachType
from sockhop.kernel.maps import U32, U64, Map, open_pinned
from sockhop.kernel.objects import BpfObject, object_path
from sockhop.kernel.syscall import check

__all__ = [
    "SPLICE_HOOKS",
    "SpliceMaps",
    "SplicedSocket",
    "Splicer",
    "Sweeper",
    "end_splicing",
    "no_counters",
    "splice_program",
    "stop_splicing",
]

SPLICE_HOOKS = (AttachType.SOCK_OPS,)
_SOCKHASH = "splice_sockets"
_SETTLED = 1.1
"""Seconds; SETTLED of sweep.bpf.c, and a little."""


def no_counters() -> SpliceCounters:
    """Return counters that have counted nothing."""
    return SpliceCounters(0, 0, 0, 0, 0, 0, 0, 0, bytes(8 * len(SpliceReason)))


class SpliceMaps:
    """The pinned maps of splicing, typed. They can be read whether or not an agent runs."""

    def __init__(self, pins: Path) -> None:
        """Open the maps below the bpffs directory *pins*; NotInstalled where there are none."""
        layouts = Layouts(object_path("splice"))
        self._pins = pins
        self._stack = ExitStack()
        policy = layouts.codec(SplicePolicy, "splice_policy")
        try:
            self.settings = self._open("splice_settings", U32, U64)
            self.services = self._open("splice_services", U32, policy)
            self.places = self._open(
                "splice_places", layouts.codec(SplicePlace, "splice_place"), policy
            )
            self.owners = self._open(
                "splice_owners", layouts.codec(SpliceOwner, "splice_owner"), policy
            )
            self.counters = self._open(
                "splice_counters", U32, layouts.codec(SpliceCounters, "splice_counters")
            )
            self.sockets = self._open(_SOCKHASH, U64, U64)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the descriptors; the maps stay pinned."""
        self._stack.close()

    def __enter__(self) -> "SpliceMaps":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def set(self, which: SpliceSetting, value: int) -> None:
        """Store a value of the map `splice_settings`."""
        self.settings.set(which, value)

    def _open(self, name: str, key: Codec[Any], value: Codec[Any]) -> Any:
        try:
            fd = open_pinned(map_directory(self._pins) / name)
        except FileNotFoundError:
            raise NotInstalled(
                f"{self._pins}: nothing is spliced here",
                hint="start an agent with a service that has `splice: auto`, "
                "or name its directory with --bpffs (SOCKHOP_BPFFS)",
            ) from None
        return self._stack.enter_context(Map(fd, key, value))


class Splicer:
    """The loaded splice programs. Closing it leaves attached programs and pinned maps in force."""

    def __init__(self, pins: Path, *, path: Path | None = None) -> None:
        """Load the programs, making or reusing the maps pinned below *pins* (bpffs, locked).

        *path*: another object file than the package's. SystemLackError where the kernel refuses.
        """
        self._pins = pins
        for directory in (map_directory(pins), link_directory(pins)):
            directory.mkdir(mode=0o700, exist_ok=True)
        self._object = BpfObject(path or object_path("splice"), pins=map_directory(pins))
        try:
            self.maps = SpliceMaps(pins)
        except BaseException:
            self._object.close()
            raise

    def close(self) -> None:
        """Close descriptors."""
        self.maps.close()
        self._object.close()

    def __enter__(self) -> "Splicer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def attach(self, cgroup: int) -> None:
        """Let sockets below the cgroup be paired, or what is attached run these programs.

        The sockhash comes first: a socket keeps the message program that was there when it was
        put in. BPF_PROG_ATTACH does it on every kernel, and lasts as long as the map.
        """
        check(
            lib.bpf_prog_attach(
                self._object.program("sockhop_message"),
                self._object.map_fd(_SOCKHASH),
                lib.BPF_SK_MSG_VERDICT,
                0,
            ),
            f"attaching to the map {_SOCKHASH}",
        )
        hooks = {AttachType.SOCK_OPS: self._object.program("sockhop_sock_ops")}
        owner = Owner(map_directory(self._pins))
        attach_hooks(hooks, cgroup, link_directory(self._pins), owner)


def splice_program(pins: Path, cgroup: Path | None = None) -> int:
    """Return the id of the program of ours that pairs sockets; 0 where there is none."""
    owner = Owner(map_directory(pins))
    found = programs_in_force(SPLICE_HOOKS, link_directory(pins), owner, cgroup)
    return found.get(AttachType.SOCK_OPS, 0)


class SplicedSocket(NamedTuple):
    """A socket in the sockhash: its lane (the way out of it), the key of its pair, and itself."""

    lane: SpliceLane
    key: SpliceKey
    socket: SpliceRecord

    @property
    def state(self) -> str:
        """The socket's state as ss names it."""
        return TCP_STATES[self.socket.state - 1]

    @property
    def local(self) -> tuple[bytes, int]:
        """Its own packed address and port."""
        key = self.key
        return (key.a_address, key.a_port) if self.lane.is_a else (key.b_address, key.b_port)

    @property
    def remote(self) -> tuple[bytes, int]:
        """The packed address and port of its peer."""
        key = self.key
        return (key.b_address, key.b_port) if self.lane.is_a else (key.a_address, key.a_port)


class Sweeper:
    """The loaded programs that visit every socket in the sockhash. Needs Linux 5.10."""

    def __init__(self, pins: Path, *, path: Path | None = None) -> None:
        """Load them over the maps pinned below *pins*; NotInstalled where there are none."""
        maps = map_directory(pins)
        if not is_pinned(pins, _SOCKHASH):
            raise NotInstalled(f"{pins}: nothing is spliced here", hint="is an agent running?")
        self._object = BpfObject(path or object_path("sweep"), pins=maps)
        layouts = self._object.layouts
        self._records = layouts.codec(SpliceRecord, "splice_record")
        self._lanes = layouts.codec(SpliceLane, "splice_lane")
        self._keys = layouts.codec(SpliceKey, "splice_key")

    def close(self) -> None:
        """Unload the programs."""
        self._object.close()

    def __enter__(self) -> "Sweeper":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def sockets(self) -> list[SplicedSocket]:
        """Return the sockets of all namespaces that are in the sockhash."""
        found = []
        for record in self._records.decode_many(self._visit("sockhop_spliced")):
            lane = self._lanes.decode(record.lane)
            found.append(SplicedSocket(lane, self._keys.decode(lane.key), record))
        return found

    def sweep(self) -> None:
        """Take out the sockets that are done with splicing, once their queues are empty.

        The first visit marks them, one at least a second later takes them out.
        """
        self._visit("sockhop_sweep")

    def _visit(self, program: str) -> bytes:
        over = self._object.map_fd(_SOCKHASH)
        link = check(
            lib.sockhop_iter_link(self._object.program(program), over), f"linking {program}"
        )
        try:
            return read_iterator(link, program)
        finally:
            os.close(link)


def stop_splicing(pins: Path, cgroup: Path | None = None) -> None:
    """Send everything by the stack and pair no more; live sockets keep working.

    What is in the sockhash stays there: see :class:`Sweeper`.
    """
    try:
        # This map every version has alike.
        settings = Map(open_pinned(map_directory(pins) / "splice_settings"), U32, U64)
    except FileNotFoundError:
        return  # ... and without maps no program of ours
    with settings:
        settings.set(SpliceSetting.OFF, 1)
    owner = Owner(map_directory(pins))
    detach_hooks(SPLICE_HOOKS, link_directory(pins), owner, cgroup)


def end_splicing(pins: Path, cgroup: Path | None = None) -> int:
    """Stop splicing, and take out the sockets whose queues are empty.

    Return how many have unread bytes: those keep the program until they are closed.
    """
    stop_splicing(pins, cgroup)
    try:
        with Sweeper(pins) as sweeper:
            if not sweeper.sockets():
                return 0
            sweeper.sweep()
            time.sleep(_SETTLED)
            sweeper.sweep()
            return len(sweeper.sockets())
    except NotInstalled:
        return 0
