"""Typed maps: codecs that cannot drift from C, batches, and the way without batches."""

import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sockhop.datapath import records
from sockhop.datapath.balancer import BalanceMaps, Balancer, remove_pins
from sockhop.datapath.records import BackendRecord, FrontendKey, SlotKey
from sockhop.errors import SystemLackError
from sockhop.kernel import maps as maps_module
from sockhop.kernel._libbpf import lib
from sockhop.kernel.bpffs import lock_directory
from sockhop.kernel.btf import Layouts
from sockhop.kernel.maps import U32, Map
from sockhop.kernel.objects import BpfObject, object_path
from sockhop.kernel.syscall import KernelError
from tests.mutants import mutant

pytestmark = pytest.mark.kernel

LAYOUTS = Layouts(object_path("balance"))


@pytest.fixture
def pins() -> Iterator[Path]:
    path = Path("/sys/fs/bpf") / f"sockhop-test-{os.getpid()}-maps"
    with lock_directory(path):
        try:
            yield path
        finally:
            remove_pins(path)


@pytest.fixture
def balance_maps(pins: Path) -> Iterator[BalanceMaps]:
    with Balancer(pins) as balancer:
        yield balancer.maps


class Renamed(NamedTuple):
    frontend: int
    generation: int
    number: int


class Mistyped(NamedTuple):
    frontend: int
    generation: bytes
    position: int


@pytest.mark.parametrize("kind", [Renamed, Mistyped])
def test_a_type_that_differs_from_c_is_refused(kind: type[tuple[object, ...]]) -> None:
    with pytest.raises(ValueError, match="struct slot_key"):
        LAYOUTS.codec(kind, "slot_key")


@given(
    st.builds(
        FrontendKey,
        st.binary(min_size=16, max_size=16),
        st.integers(0, 2**64 - 1),
        st.integers(0, 65535),
        st.integers(0, 255),
        st.integers(0, 255),
    )
)
def test_what_is_encoded_is_decoded(key: FrontendKey) -> None:
    codec = LAYOUTS.codec(FrontendKey, "frontend_key")
    assert codec.decode(codec.encode(key)) == key
    assert len(codec.encode(key)) == codec.size == LAYOUTS.size("frontend_key")


class _WithoutBatches:
    def __getattr__(self, name: str) -> object:
        return (lambda *_: -errno.EINVAL) if name.endswith("_batch") else getattr(lib, name)


def record(port: int) -> BackendRecord:
    return BackendRecord(port, 1, bytes(16), port, 1, 6, 0)


@pytest.mark.parametrize("batches", [True, False])
def test_many_entries(
    balance_maps: BalanceMaps, monkeypatch: pytest.MonkeyPatch, batches: bool
) -> None:
    backends = balance_maps.backends
    if not batches:
        # What a kernel before 5.6 answers to each batch operation.
        monkeypatch.setattr(maps_module, "lib", _WithoutBatches())
    wanted = {i: record(i % 65536) for i in range(1, 10001)}
    backends.update_many(wanted.items())
    assert dict(backends.items()) == wanted
    assert set(backends.keys()) == set(wanted)
    assert backends.used() == len(wanted)
    backends.delete_many([*range(1, 9001), 77777])
    assert set(backends.keys()) == set(range(9001, 10001))
    assert backends.get(9001) == wanted[9001]
    assert backends.get(1) is None
    assert not backends.delete(1)


def test_a_full_map_says_so(balance_maps: BalanceMaps) -> None:
    with pytest.raises(KernelError, match="writing to the map settings.*E2BIG"):
        balance_maps.settings.set(1000, 1)


def test_a_map_of_another_size_is_refused(balance_maps: BalanceMaps) -> None:
    with pytest.raises(ValueError, match="map slots has keys of 12 and values of"):
        Map(os.dup(balance_maps.slots.fd), U32, U32).close()


def test_pins_of_another_version_are_refused(pins: Path, tmp_path: Path) -> None:
    with Balancer(pins):
        pass
    path = mutant(
        tmp_path,
        "balance",
        ("char name[192];\n};\n\nstruct counters", "char name[200];\n};\n\nstruct counters"),
    )
    with pytest.raises(SystemLackError, match="services: this map was made by another version"):
        Balancer(pins, path=path)


def test_sizes_are_chosen_once(pins: Path) -> None:
    with Balancer(pins, sizes={"frontends": 1000, "slots": 2000}) as balancer:
        maps = balancer.maps
        assert [m.max_entries for m in (maps.frontends, maps.words, maps.counters)] == [1000] * 3
        assert maps.slots.max_entries == 2000
    with Balancer(pins) as balancer:
        assert balancer.maps.slots.max_entries == 2000
    with pytest.raises(SystemLackError, match="slots: this map was made.* with another size"):
        Balancer(pins, sizes={"slots": 3000})


def test_another_abi_is_refused(pins: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Balancer(pins):
        pass
    monkeypatch.setattr("sockhop.datapath.pins.ABI", records.ABI + 1)
    with pytest.raises(SystemLackError, match=r"maps have the ABI 2, those of this version 3"):
        BalanceMaps(pins)


def test_the_verifiers_log_reaches_the_user(pins: Path, tmp_path: Path) -> None:
    path = mutant(
        tmp_path, "balance", ("copy->backend = READ_ONCE(found->backend);",
                              "copy->backend = ((__u32 *)found)[4096];")
    )  # fmt: skip
    with pytest.raises(SystemLackError) as caught:
        BpfObject(path, pins=pins / "maps")
    assert "loading balance.bpf.o" in caught.value.message
    assert "invalid access to map value" in caught.value.hint


def test_the_slot_key_is_what_a_slot_repeats() -> None:
    assert LAYOUTS.codec(SlotKey, "slot_key").size == next(
        int(member.code[:-1]) for member in LAYOUTS.members("slot") if member.name == "key"
    )


def test_what_an_older_kernel_lacks_is_named(tmp_path: Path) -> None:
    """Helpers as an older kernel would see them: those of a number that this one does not know."""
    path = mutant(
        tmp_path, "netns", ("bpf_get_netns_cookie(sk)", "((__u64(*)(void *))999999)(sk)")
    )  # fmt: skip
    with pytest.raises(SystemLackError) as caught:
        BpfObject(path)
    assert "loading netns.bpf.o: the kernel lacks the helper" in caught.value.message
