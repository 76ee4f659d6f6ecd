"""What older kernels have elsewhere, tried with this kernel's types changed to theirs."""

import ctypes
import os
import struct
from pathlib import Path

import pytest

from sockhop.kernel.btf_file import RUNNING, BtfFile, Kind
from sockhop.kernel.objects import object_path
from tests.mutants import mutant

pytestmark = pytest.mark.kernel

ONLY_NEWER = ("if (!bpf_core_field_exists(cgroup->ancestors))", "if (0)")


class Options(ctypes.Structure):
    """struct bpf_object_open_opts, as far as it is used."""

    _fields_ = (
        ("sz", ctypes.c_size_t),
        ("object_name", ctypes.c_char_p),
        ("relaxed_maps", ctypes.c_bool),
        ("pin_root_path", ctypes.c_char_p),
        ("unused", ctypes.c_uint32),
        ("kconfig", ctypes.c_char_p),
        ("btf_custom_path", ctypes.c_char_p),
    )


def with_ancestor_ids(target: Path) -> Path:
    """Write this kernel's types, but struct cgroup with u64 ancestor_ids[] as before Linux 6.1."""
    data, types = bytearray(RUNNING.read_bytes()), BtfFile.open()
    every = types._types
    cgroup = next(t for t in every if t.kind is Kind.STRUCT and types._name(t.name) == "cgroup")
    for at in range(cgroup.at, cgroup.at + 12 * cgroup.vlen, 12):
        name, kind, _ = struct.unpack_from("=III", data, at)
        if types._name(name) == "ancestors":
            break
    else:
        pytest.fail("struct cgroup has no ancestors")
    word = next(
        number
        for number, t in enumerate(every)
        if t.kind is Kind.INT and t.size == 8 and "unsigned" in types._name(t.name)
    )
    (strings,) = struct.unpack_from("=I", data, 20)  # the size of the last section
    assert types._strings_end == len(data)
    struct.pack_into("=I", data, at, strings)
    struct.pack_into("=I", data, every[kind].at, word)
    new = b"ancestor_ids\0"
    struct.pack_into("=I", data, 20, strings + len(new))
    target.write_bytes(data + new)
    return target


def load(path: Path, types: Path) -> int:
    """Load an object over other types; return 0 or -errno."""
    libbpf = ctypes.CDLL("libbpf.so.1", use_errno=True)
    for name in ("open_file", "next_map"):
        getattr(libbpf, f"bpf_object__{name}").restype = ctypes.c_void_p
    options = Options(sz=ctypes.sizeof(Options), btf_custom_path=os.fsencode(types))
    opened = ctypes.c_void_p(libbpf.bpf_object__open_file(os.fsencode(path), ctypes.byref(options)))
    assert opened.value, path
    try:
        found = None
        while found := libbpf.bpf_object__next_map(opened, ctypes.c_void_p(found)):
            assert libbpf.bpf_map__set_pin_path(ctypes.c_void_p(found), None) == 0
        return int(libbpf.bpf_object__load(opened))
    finally:
        libbpf.bpf_object__close(opened)


def test_splicing_finds_cgroups_before_6_1(tmp_path: Path) -> None:
    older = with_ancestor_ids(tmp_path / "types")
    assert load(object_path("splice"), RUNNING) == 0
    assert load(object_path("splice"), older) == 0
    assert load(mutant(tmp_path, "splice", ONLY_NEWER), older) < 0
