"""BPF objects: the compiled programs of the package, loaded with libbpf.

Some come a second time as `X.plain.bpf.o`, for kernels that lack instructions which the first one
uses: Linux kernel commits 5ffa25502b5a ("bpf: Add instructions for atomic_[cmp]xchg") and
981f94c3e921 ("bpf: Add bitwise atomic instructions") (in v5.12).
"""

import errno
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from sockhop.errors import SystemLackError
from sockhop.kernel._libbpf import ffi, lib
from sockhop.kernel.btf import Layouts
from sockhop.kernel.maps import map_info, open_pinned
from sockhop.kernel.syscall import KernelError, check, last_log

__all__ = [
    "BpfObject",
    "ProgramInfo",
    "declared_sizes",
    "identify_program",
    "object_path",
    "open_program",
    "program_info",
]

_OBJECTS = Path(__file__).parent.parent / "bpf"
_UNKNOWN_ATOMIC = "BPF_STX uses reserved fields"
"""What the verifier of such a kernel says (resolve_pseudo_ldimm64)."""


def object_path(name: str) -> Path:
    """Return where the package keeps the compiled object *name* (`balance` for balance.bpf.c)."""
    return _OBJECTS / f"{name}.bpf.o"


class ProgramInfo(NamedTuple):
    """What the kernel says of a program (struct bpf_prog_info); the tag is hex text."""

    id: int
    name: str
    tag: str
    map_ids: tuple[int, ...]


def program_info(fd: int) -> ProgramInfo:
    """Return the kernel's description of the program behind *fd*."""
    ids = ffi.new("__u32[]", 64)
    info = ffi.new("struct bpf_prog_info *")
    info.nr_map_ids = len(ids)
    info.map_ids = int(ffi.cast("uintptr_t", ids))
    size = ffi.new("__u32 *", ffi.sizeof("struct bpf_prog_info"))
    check(lib.bpf_obj_get_info_by_fd(fd, info, size), "reading a program's info")
    return ProgramInfo(
        info.id,
        ffi.string(info.name).decode(),
        bytes(info.tag).hex(),
        tuple(ids[i] for i in range(min(info.nr_map_ids, len(ids)))),
    )


def declared_sizes(path: Path) -> dict[str, int]:
    """Return the sizes that the object file at *path* gives its maps. Needs no permission."""
    opened = _open_object(path, None)
    try:
        return {
            ffi.string(lib.bpf_map__name(found)).decode(): lib.bpf_map__max_entries(found)
            for found in _maps(opened)
        }
    finally:
        lib.bpf_object__close(opened)


def open_program(number: int) -> int:
    """Return a descriptor of the program with the id *number*; FileNotFoundError if it is gone.

    KernelError without CAP_SYS_ADMIN, which the kernel wants for every look-up by id.
    """
    fd = lib.bpf_prog_get_fd_by_id(number)
    if fd == -errno.ENOENT:
        raise FileNotFoundError(errno.ENOENT, "no such program", str(number))
    if fd < 0:
        raise KernelError(
            f"opening program {number}", -fd, hint="run as root with CAP_SYS_ADMIN (and CAP_BPF)"
        )
    return int(fd)


def identify_program(number: int) -> ProgramInfo:
    """Return the kernel's description of the program with that id. Errors as open_program()."""
    fd = open_program(number)
    try:
        return program_info(fd)
    finally:
        os.close(fd)


class BpfObject:
    """A loaded object. Its programs and maps go when it is closed, unless pinned or attached."""

    def __init__(
        self,
        path: Path,
        *,
        pins: Path | None = None,
        max_entries: Mapping[str, int] | None = None,
        key_sizes: Mapping[str, int] | None = None,
        given: Mapping[str, int] | None = None,
    ) -> None:
        """Load the object file at *path*.

        Maps declared with LIBBPF_PIN_BY_NAME are shared through, and pinned in, *pins*; those that
        are there keep their size. By the map's name: *max_entries* and *key_sizes* size it, *given*
        are descriptors of maps to put in its place. Where the kernel refuses its instructions, the
        plain one is loaded instead, if there is one. SystemLackError carries the end of the
        verifier's log.
        """
        self.layouts = Layouts(path)
        choices = (pins, max_entries or {}, key_sizes or {}, given or {})
        plain = path.with_name(path.name.replace(".bpf.o", ".plain.bpf.o"))
        try:
            self._load(path, *choices)
        except SystemLackError:
            if not (plain.exists() and _UNKNOWN_ATOMIC in last_log()):
                raise
            self._load(plain, *choices)

    def _load(
        self,
        path: Path,
        pins: Path | None,
        max_entries: Mapping[str, int],
        key_sizes: Mapping[str, int],
        given: Mapping[str, int],
    ) -> None:
        self.path = path
        lib.sockhop_log_reset()
        self._object = _open_object(path, pins)
        try:
            for name, entries in (self._pinned_sizes() | dict(max_entries)).items():
                check(lib.bpf_map__set_max_entries(self._map(name), entries), f"sizing {name}")
            for name, size in key_sizes.items():
                check(lib.bpf_map__set_key_size(self._map(name), size), f"sizing keys of {name}")
            for name, fd in given.items():
                check(lib.bpf_map__reuse_fd(self._map(name), fd), f"using a map as {name}")
            result = lib.bpf_object__load(self._object)
            if result < 0:
                raise _load_error(path, pins, -result)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close everything that the object holds open."""
        if self._object is not None:
            lib.bpf_object__close(self._object)
            self._object = None

    def __enter__(self) -> "BpfObject":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def program(self, name: str) -> int:
        """Return the descriptor of a loaded program, owned by the object."""
        return check(lib.bpf_program__fd(self._programs()[name]), f"program {name}")

    def map_fd(self, name: str) -> int:
        """Return the descriptor of a map, owned by the object."""
        return check(lib.bpf_map__fd(self._map(name)), f"map {name}")

    def _pinned_sizes(self) -> dict[str, int]:
        sizes: dict[str, int] = {}
        for found in _maps(self._object):
            path = lib.bpf_map__pin_path(found)
            if path == ffi.NULL:
                continue
            with suppress(FileNotFoundError):
                fd = open_pinned(Path(ffi.string(path).decode()))
                sizes[ffi.string(lib.bpf_map__name(found)).decode()] = map_info(fd).max_entries
                os.close(fd)
        return sizes

    def _map(self, name: str) -> Any:
        found = lib.bpf_object__find_map_by_name(self._object, name.encode())
        if found == ffi.NULL:
            raise KeyError(name)
        return found

    def _programs(self) -> dict[str, Any]:
        programs: dict[str, Any] = {}
        program = ffi.NULL
        while True:
            program = lib.bpf_object__next_program(self._object, program)
            if program == ffi.NULL:
                return programs
            programs[ffi.string(lib.bpf_program__name(program)).decode()] = program


def _open_object(path: Path, pins: Path | None) -> Any:
    options = ffi.new("struct bpf_object_open_opts *")
    options.sz = ffi.sizeof("struct bpf_object_open_opts")
    root = ffi.new("char[]", str(pins).encode()) if pins else ffi.NULL
    options.pin_root_path = root
    opened = lib.bpf_object__open_file(str(path).encode(), options)
    if opened == ffi.NULL:
        raise KernelError(f"opening {path}", ffi.errno)
    return opened


def _maps(opened: Any) -> Iterator[Any]:
    found = ffi.NULL
    while (found := lib.bpf_object__next_map(opened, found)) != ffi.NULL:
        yield found


def _load_error(path: Path, pins: Path | None, number: int) -> SystemLackError:
    log = last_log()
    if mismatch := re.search(r"couldn't reuse pinned map at '([^']+)'", log):
        return SystemLackError(
            f"{mismatch[1]}: this map was made by another version or with another size",
            hint="end balancing and start afresh with `sockhop detach`",
        )
    if number == errno.EPERM and "verifier" not in log and "PROG LOAD LOG" not in log:
        return KernelError(f"loading {path.name}", number)
    doing = f"loading {path.name}" + (f" with the pins in {pins}" if pins else "")
    if lacks := _lacking(log):
        doing += f": the kernel lacks {lacks}"
    return KernelError(doing, number, hint=f"libbpf and the verifier said:\n{log}")


def _lacking(log: str) -> str:
    """What the verifier of an older kernel says about what it does not know; "" for else."""
    if _UNKNOWN_ATOMIC in log:
        return "atomic instructions that fetch (Linux 5.12)"
    helper = re.search(r"(?:invalid|unknown) func (\S+)|this type cannot use helper (\S+)", log)
    return f"the helper {helper[1] or helper[2]} here" if helper else ""
