"""The reconciler against real maps: any state from any other, also after dying in the middle."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sockhop.agent import installer as installer_module
from sockhop.agent.capacity import CapacityError
from sockhop.agent.installed import read_installed
from sockhop.agent.installer import Installer, ReadBackError
from sockhop.agent.plan import make_plan
from sockhop.agent.target import Entry, Target, expand
from sockhop.datapath.balancer import BalanceMaps, Balancer, remove_pins
from sockhop.datapath.records import BLOCK_ENTRIES, ClientKey, FrontendKey, Setting, SlotKey
from sockhop.datapath.shares import table_for
from sockhop.kernel.bpffs import lock_directory
from sockhop.kernel.maps import Map
from sockhop.model import Algorithm, Backend, Desired, Frontend, Protocol, Service
from tests.agent.strategies import PLACES, desired_states

pytestmark = pytest.mark.kernel

HOME = 7
LIVE_KERNEL = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(scope="module")
def maps(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BalanceMaps]:
    pins = Path("/sys/fs/bpf") / f"sockhop-test-{tmp_path_factory.getbasetemp().name}-installer"
    with lock_directory(pins):
        try:
            with Balancer(pins, sizes={"frontends": 256}) as balancer:
                yield balancer.maps
        finally:
            remove_pins(pins)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    # Nobody reads: no hook is attached here. tests/kernel/test_atomic_change.py needs the grace.
    monkeypatch.setattr(installer_module, "grace_period", lambda: None)


def become(installer: Installer, desired: Desired) -> Target:
    target = expand(desired, HOME, PLACES)
    installer.apply(make_plan(target, installer.installed))
    return target


def check(maps: BalanceMaps, target: Target) -> None:
    """The maps hold the target, all of it, and nothing else."""
    found = read_installed(maps)
    entries: dict[FrontendKey, Entry] = {key: old.entry for key, old in found.entries.items()}
    assert entries == target.entries
    assert {member: old.backend for member, old in found.members.items()} == target.members
    assert found.services.keys() == {entry.service for entry in target.entries.values()}
    wanted = {
        SlotKey(old.id, old.generation, i)
        for old in found.entries.values()
        for i in range(len(old.entry.backends))
    }
    assert set(maps.slots.keys()) == wanted
    blocks = {
        SlotKey(old.id, old.generation, i)
        for old in found.entries.values()
        for i in range(-(-len(table_for(*old.entry.choice)) // BLOCK_ENTRIES))
    }
    assert set(maps.tables.keys()) == blocks
    clients = {ClientKey(cgroup, old.id) for old in found.entries.values()
               for cgroup, _ in old.entry.cgroups}  # fmt: skip
    assert set(maps.clients.keys()) == clients
    used = {old.id for old in found.entries.values()}
    assert len(used) == len(found.entries)
    assert {number for number, value in maps.words.items() if value} <= used
    assert all(slot.backend in {m.id for m in found.members.values()}
               for _, slot in maps.slots.items())  # fmt: skip


@LIVE_KERNEL
@given(st.lists(desired_states(), min_size=1, max_size=4))
def test_any_state_from_any_other(maps: BalanceMaps, states: list[Desired]) -> None:
    installer = Installer(maps)
    for state in states:
        target = become(installer, state)
        check(maps, target)
        assert installer.installed == read_installed(maps)
        assert not make_plan(target, installer.installed)


class Died(Exception):
    pass


@contextmanager
def dying(after: int) -> Iterator[None]:
    """Let the process die at the given write to a map."""
    left = after

    def counting(original: Callable[..., Any]) -> Callable[..., Any]:
        def write(self: Any, *arguments: Any) -> Any:
            nonlocal left
            if left == 0:
                raise Died
            left -= 1
            return original(self, *arguments)

        return write

    with pytest.MonkeyPatch.context() as patch:
        for name in ("_store", "delete"):
            patch.setattr(Map, name, counting(getattr(Map, name)))
        # One by one, so that it can die between any two entries.
        patch.setattr(Map, "_update_batch", lambda *_: 0)
        yield


@LIVE_KERNEL
@given(desired_states(), desired_states(), desired_states(), st.integers(0, 60))
def test_dying_anywhere(
    maps: BalanceMaps, before: Desired, meant: Desired, after: Desired, at: int
) -> None:
    installer = Installer(maps)
    old = become(installer, before)
    try:
        with dying(at):
            become(installer, meant)
    except Died:
        # Readers meet, at every frontend, what was or what was meant.
        new = expand(meant, HOME, PLACES)
        for key, found in read_installed(maps).entries.items():
            assert found.entry.choice in [
                state.entries[key].choice for state in (old, new) if key in state.entries
            ]
        for key in old.entries.keys() & new.entries.keys():
            assert maps.frontends.get(key) is not None
    # The next agent knows nothing of this one.
    check(maps, become(Installer(maps), after))


def test_ids_stay_when_nothing_changes(maps: BalanceMaps) -> None:
    frontend = Frontend("10.0.0.1", 80, Protocol.TCP, backends=(Backend("10.1.0.1", 80),))
    desired = Desired((Service("web", (frontend,)),))
    become(Installer(maps), Desired())
    become(Installer(maps), desired)
    before, generation = read_installed(maps), maps.setting(Setting.GENERATION)
    become(Installer(maps), desired)
    assert read_installed(maps) == before
    assert maps.setting(Setting.GENERATION) == generation


def test_a_backend_that_comes_back_has_another_id(maps: BalanceMaps) -> None:
    def web(*backends: Backend) -> Desired:
        return Desired(
            (Service("web", (Frontend("10.0.0.1", 80, Protocol.TCP, backends=backends),)),)
        )

    installer = Installer(maps)
    become(installer, web(Backend("10.1.0.1", 80)))
    first = {old.id for old in installer.installed.members.values()}
    become(installer, web())
    become(installer, web(Backend("10.1.0.1", 80)))
    assert first.isdisjoint(old.id for old in installer.installed.members.values())


def test_a_full_map_is_refused_before_anything_is_written(
    maps: BalanceMaps, monkeypatch: pytest.MonkeyPatch
) -> None:
    installer = Installer(maps)
    become(installer, Desired())
    monkeypatch.setattr(type(maps.slots), "max_entries", property(lambda self: 2))
    backends = tuple(Backend("10.1.0.1", port) for port in (1, 2, 3))
    frontend = Frontend("10.0.0.1", 80, Protocol.TCP, backends=backends)
    with pytest.raises(CapacityError, match="map slots has room for 2 entries.* needs 3"):
        become(installer, Desired((Service("web", (frontend,)),)))
    monkeypatch.undo()
    assert not maps.slots.keys()
    assert not maps.frontends.keys()


@pytest.mark.parametrize("what", ["slots", "words", "frontends", "backends", "tables"])
def test_read_back_notices_another_writer(
    maps: BalanceMaps, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    installer = Installer(maps)
    become(installer, Desired())
    frontend = Frontend("10.0.0.1", 80, Protocol.TCP, backends=(Backend("10.1.0.1", 80),))
    desired = Desired((Service("web", (frontend,), Algorithm.ROUND_ROBIN),))

    def interfere() -> None:
        target = getattr(maps, what)
        if what == "words":
            target.update_many((number, 7) for number, value in target.items() if value)
        else:
            target.delete_many(target.keys())

    monkeypatch.setattr(installer_module, "grace_period", interfere)
    with pytest.raises(ReadBackError, match=f"the map {what} does not hold"):
        become(installer, desired)
    # What the agent then does: it takes the maps as they are, and mends them.
    monkeypatch.setattr(installer_module, "grace_period", lambda: None)
    installer.read()
    target = become(installer, desired)
    Installer(maps)  # sweeps what the damaged state has left
    check(maps, target)
