"""The tracer: programs that record which kernel functions run for the sockets of one address."""

import os
from collections.abc import Iterable
from contextlib import ExitStack
from enum import IntEnum, StrEnum
from pathlib import Path
from typing import NamedTuple

from sockhop.datapath.traced_functions import FUNCTIONS, Function
from sockhop.errors import SystemLackError
from sockhop.kernel._libbpf import ffi, lib
from sockhop.kernel.maps import U32, U64, Map
from sockhop.kernel.objects import BpfObject, object_path
from sockhop.kernel.syscall import KernelError, check

__all__ = ["Means", "TraceKind", "TraceRecord", "Tracer"]

_KPROBES = Path("/sys/bus/event_source/devices/kprobe/type")
_ALWAYS = {"inet_sock_set_state": "sockhop_state", "tcp_destroy_sock": "sockhop_end"}
_REDUCED = {
    "sock_recv_length": "sockhop_recv_length",
    "sock_send_length": "sockhop_send_length",
    "sk_data_ready": "sockhop_ready",
}


class Means(StrEnum):
    """By what functions are traced."""

    KPROBES = "kprobes"
    TRACEPOINTS = "tracepoints"


class TraceKind(IntEnum):
    """enum trace_kind."""

    CALL = 0
    STATE = 1
    RECEIVED = 2
    SENT = 3
    READY = 4
    END = 5


class TraceTarget(NamedTuple):
    """struct trace_target. `address` is packed."""

    address: bytes
    port: int


class TraceRecord(NamedTuple):
    """struct trace_record. Addresses are 16 bytes, IPv4 mapped; `stack` is u64s, innermost first.

    `time` in ns (CLOCK_MONOTONIC); `pid` and `thread`, as the host numbers them: who was running.
    """

    local_address: bytes
    remote_address: bytes
    time: int
    sock: int
    handlers: int
    receiver: int
    at: int
    value: int
    netns: int
    pid: int
    thread: int
    local_port: int
    remote_port: int
    kind: int
    state: int
    command: bytes
    stack: bytes

    @property
    def frames(self) -> list[int]:
        """The stack as addresses."""
        return [each for each in memoryview(self.stack).cast("Q").tolist() if each]


class Tracer:
    """The loaded programs. Use as a context manager; attached from start() until the end."""

    def __init__(self, target: tuple[bytes, int]) -> None:
        self._stack = ExitStack()
        with ExitStack() as stack:
            self._object = stack.enter_context(BpfObject(object_path("trace")))
            layouts = self._object.layouts
            self._codec = layouts.codec(TraceRecord, "trace_record")
            with Map(
                os.dup(self._object.map_fd("trace_target")),
                U32,
                layouts.codec(TraceTarget, "trace_target"),
            ) as settings:
                settings.set(0, TraceTarget(*target))
            self._stack = stack.pop_all()
        self.reason = ""
        """Why functions are not traced, "" if they are."""

    def __enter__(self) -> "Tracer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Detach and unload."""
        self._stack.close()

    def start(self, functions: Iterable[Function] = FUNCTIONS.values()) -> tuple[Means, list[str]]:
        """Attach to those of *functions* that the kernel has, else to tracepoints.

        Returns by what, and the names of what is traced. SystemLackError where neither can be.
        """
        traced = self._kprobes(functions)
        points = [point for point in _ALWAYS if self._point(point, _ALWAYS[point])]
        if traced:
            return Means.KPROBES, traced
        found = [point for point in _REDUCED if self._point(point, _REDUCED[point])]
        if "sock_recv_length" not in found:
            raise SystemLackError(
                f"calls cannot be traced here: {self.reason}; and there is no tracepoint "
                "sock_recv_length",
                hint="kprobes need CONFIG_KPROBES and CONFIG_BPF_EVENTS, the tracepoint Linux 6.3",
            )
        return Means.TRACEPOINTS, points + found

    def records(self) -> list[TraceRecord]:
        """Return what has been recorded since the last call, in order."""
        value = ffi.new("char[]", self._codec.size)
        view, found = ffi.buffer(value), []
        of = self._object.map_fd("trace_records")
        while lib.bpf_map_lookup_and_delete_elem(of, ffi.NULL, value) == 0:
            found.append(self._codec.decode(view))
        return found

    def lost(self) -> int:
        """Return how many records found no room, because nobody called records() in time."""
        with Map(os.dup(self._object.map_fd("trace_counts")), U32, U64) as counts:
            return counts.get(0) or 0

    def _kprobes(self, functions: Iterable[Function]) -> list[str]:
        """Attach to functions; those that the kernel lacks, or lets nobody trace, are left out."""
        try:
            unit = int(_KPROBES.read_text())
        except OSError as error:
            self.reason = f"no kprobes ({_KPROBES}: {error.strerror})"
            return []
        traced = []
        for each in functions:
            name = ffi.new("char[]", each.name.encode())
            fd = lib.sockhop_kprobe(unit, name, 0, self._object.program(each.place))
            if fd < 0:
                self.reason = self.reason or str(KernelError(f"kprobe on {each.name}", -fd))
                continue
            self._stack.callback(os.close, fd)
            traced.append(each.name)
            if each.result:
                program = self._object.program(each.result)
                fd = check(lib.sockhop_kprobe(unit, name, 1, program), f"kretprobe on {each.name}")
                self._stack.callback(os.close, fd)
        if traced:
            self.reason = ""
        return traced

    def _point(self, point: str, program: str) -> bool:
        """Attach to a tracepoint; False if the kernel does not have it."""
        fd = lib.bpf_raw_tracepoint_open(point.encode(), self._object.program(program))
        if fd < 0:
            return False
        self._stack.callback(os.close, fd)
        return True
