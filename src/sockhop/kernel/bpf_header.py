"""What a kernel's BPF can do, as C macros: the `bpf_features.h` of Cilium and of bpftool.

Cilium's agent keeps it in /var/run/cilium/state/globals/bpf_features.h. The names are those that
`bpftool feature probe kernel macros` prints (tools/bpf/bpftool/feature.c).
"""

import re
from collections.abc import Callable, Iterable
from functools import cache

from sockhop.errors import InputError
from sockhop.kernel._libbpf import ffi, lib
from sockhop.kernel.btf_file import BtfFile
from sockhop.kernel.host import missing_capabilities

__all__ = ["macro_use", "parse_macros", "probe_macros"]

_LINE = re.compile(r"^[ \t]*#[ \t]*define[ \t]+(\w+)(?!\()\b[ \t]*(.*?)[ \t]*$", re.MULTILINE)
_HELPER = re.compile(r"BPF__PROG_TYPE_(\w+)__HELPER_bpf_(\w+)")
_MAP = re.compile(r"HAVE_(\w+)_MAP_TYPE")
_PROGRAM = re.compile(r"HAVE_(\w+)_PROG_TYPE")

_MAPS = {
    "SOCKHASH": "splicing, auditing",
    "SOCKMAP": "auditing",
    "SK_STORAGE": "provenance",
    "HASH": "services",
    "ARRAY": "services, counters",
    "LRU_HASH": "session affinity",
    "LPM_TRIE": "policies",
}
_PROGRAMS = {
    "CGROUP_SOCK_ADDR": "balancing",
    "CGROUP_SOCK": "balancing",
    "SOCK_OPS": "splicing",
    "SK_MSG": "splicing",
    "TRACING": "iterators, call paths",
    "KPROBE": "call paths",
}
_HELPERS = (
    *("get_socket_cookie", "get_netns_cookie", "ktime_get_boot_ns", "set_retval", "seq_write"),
    *("sk_storage_get", "msg_redirect_hash", "sock_hash_update", "skc_to_tcp_sock", "snprintf"),
    *("map_lookup_elem", "map_update_elem", "map_delete_elem", "sock_from_file"),
    *("get_prandom_u32", "get_current_pid_tgid", "probe_read_kernel"),
)
_UNUSED = "nothing in sockhop"


def parse_macros(text: str, source: str) -> dict[str, bool]:
    """Return what the macros say: `HAVE_X`, `NO_HAVE_X`, `BPF__PROG_TYPE_X__HELPER_Y 0`.

    `NO_HAVE_X` is told as `HAVE_X`. InputError where there is no such macro.
    """
    found = {}
    for name, value in _LINE.findall(text):
        if name.startswith("NO_HAVE_"):
            found[name.removeprefix("NO_")] = False
        elif name.startswith("HAVE_") or _HELPER.fullmatch(name):
            found[name] = value != "0"
    if not found:
        raise InputError(
            f"{source}: this is no bpf_features.h: it defines nothing like HAVE_SOCKHASH_MAP_TYPE",
            hint="Cilium keeps it in /var/run/cilium/state/globals/bpf_features.h",
        )
    return found


def probe_macros(names: Iterable[str], types: BtfFile) -> dict[str, bool]:
    """Return what the running kernel answers to *names*, those that libbpf can probe.

    {} without the rights to probe. *types*: the running kernel's, for the numbers behind the names.
    """
    lib.sockhop_log_reset()  # libbpf prints nothing from here on
    # libbpf takes EPERM for a no.
    if missing_capabilities(("CAP_BPF", "CAP_NET_ADMIN", "CAP_PERFMON")) or not _has_maps():
        return {}
    numbers: dict[str, int] = {}
    for enum in ("bpf_func_id", "bpf_map_type", "bpf_prog_type"):
        numbers |= types.enum(enum)
    found = {}
    for name in names:
        answer = _probe(name, numbers)
        if answer is not None:
            found[name] = answer
    return found


def _probe(name: str, numbers: dict[str, int]) -> bool | None:
    """None where it cannot be told. What the kernel has no number for, it does not have."""
    trial: Callable[[int], int]
    if helper := _HELPER.fullmatch(name):
        program = numbers.get(f"BPF_PROG_TYPE_{helper[1].upper()}")
        if program is None or not _has_programs(program):
            return False
        number = numbers.get(f"BPF_FUNC_{helper[2]}")
        trial = lambda number: lib.libbpf_probe_bpf_helper(program, number, ffi.NULL)  # noqa: E731
    elif kind := _MAP.fullmatch(name):
        number = numbers.get(f"BPF_MAP_TYPE_{kind[1]}")
        trial = lambda number: lib.libbpf_probe_bpf_map_type(number, ffi.NULL)  # noqa: E731
    elif kind := _PROGRAM.fullmatch(name):
        number = numbers.get(f"BPF_PROG_TYPE_{kind[1]}")
        trial = lambda number: lib.libbpf_probe_bpf_prog_type(number, ffi.NULL)  # noqa: E731
    else:
        return None
    if number is None:
        return False
    answer = trial(number)
    return None if answer < 0 else answer > 0


def _has_maps() -> bool:
    return bool(lib.libbpf_probe_bpf_map_type(lib.BPF_MAP_TYPE_ARRAY, ffi.NULL) > 0)


@cache
def _has_programs(kind: int) -> bool:
    # libbpf's probe of a helper says yes where the kernel has no such programs at all.
    return bool(lib.libbpf_probe_bpf_prog_type(kind, ffi.NULL) != 0)


def macro_use(name: str) -> str:
    """Return what sockhop uses the thing for that a macro tells of."""
    if helper := _HELPER.fullmatch(name):
        program = _PROGRAMS.get(helper[1].upper(), "")
        return program if program and helper[2] in _HELPERS else _UNUSED
    if kind := _MAP.fullmatch(name):
        return _MAPS.get(kind[1], _UNUSED)
    if kind := _PROGRAM.fullmatch(name):
        return _PROGRAMS.get(kind[1], _UNUSED)
    return _UNUSED
