"""The synchroniser on real maps: it compares only what differs, and misses nothing."""

import errno
import functools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sockhop.agent import installer as installer_module
from sockhop.agent.installer import Installer
from sockhop.agent.policies import PolicyKeeper
from sockhop.agent.state import AgentState, SourceState
from sockhop.agent.sync import Synchronizer
from sockhop.agent.target import expand
from sockhop.datapath.balancer import BalanceMaps, Balancer, remove_pins
from sockhop.datapath.policies import PolicyMaps
from sockhop.kernel.bpffs import lock_directory
from sockhop.kernel.cgroups import cgroup_root
from sockhop.kernel.syscall import KernelError
from sockhop.model import Backend, Desired, Frontend, Protocol, Service
from sockhop.sources.files import Loaded
from tests.agent.strategies import PLACES, desired_states
from tests.agent.test_installer import HOME, LIVE_KERNEL, check

pytestmark = pytest.mark.kernel

_PLACES = st.sampled_from([PLACES, PLACES, {}, {"/a": 11}, PLACES | {"/run/netns/a": 23}])


@pytest.fixture(scope="module")
def maps(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BalanceMaps]:
    pins = Path("/sys/fs/bpf") / f"sockhop-test-{tmp_path_factory.getbasetemp().name}-sync"
    with lock_directory(pins):
        try:
            with Balancer(pins, sizes={"frontends": 256}) as balancer:
                yield balancer.maps
        finally:
            remove_pins(pins)


_policy_maps = functools.cache(PolicyMaps)


class Source:
    """What the agent would read, what the paths in it name, and whether the kernel takes it."""

    def __init__(self, maps: BalanceMaps) -> None:
        self.loaded = Loaded(Desired(), ())
        self.places: dict[str, int] = {}
        self.state = AgentState(os.getpid(), "", 0, "", "", SourceState([]))
        policies = PolicyKeeper(_policy_maps(maps.pins), cgroup_root())
        self.sync = Synchronizer(lambda: self.loaded, Installer(maps), policies, self.state, HOME)
        patched: Any = self.sync.places
        patched.find = lambda desired: self.places

    def run(self, desired: Desired, places: dict[str, int]) -> bool:
        self.loaded, self.places = Loaded(desired, ()), places
        return self.sync.run()


def refusing_once() -> Callable[[], None]:
    outcomes = iter([KernelError("membarrier", errno.EINVAL)])

    def grace_period() -> None:
        for error in outcomes:
            raise error

    return grace_period


@LIVE_KERNEL
@given(st.lists(desired_states(), min_size=2, max_size=4), st.data())
def test_any_state_from_any_other_and_back(
    maps: BalanceMaps, states: list[Desired], data: st.DataObject
) -> None:
    source = Source(maps)
    steps = st.lists(
        st.tuples(st.sampled_from(states), _PLACES, st.sampled_from([True, True, True, False])),
        max_size=8,
    )
    for desired, places, works in data.draw(steps):
        with pytest.MonkeyPatch.context() as patch:
            grace_period = (lambda: None) if works else refusing_once()
            patch.setattr(installer_module, "grace_period", grace_period)
            if not source.run(desired, places):
                assert not works
                continue
        target = expand(desired, HOME, places)
        check(maps, target)
        assert source.state.services == len(desired.services)
        assert source.state.backends == len(target.members)
        assert source.state.frontends == len(list(desired.frontends()))


def test_one_change_is_looked_at_alone(maps: BalanceMaps, monkeypatch: pytest.MonkeyPatch) -> None:
    def service(number: int, port: int) -> Service:
        backend = Backend("10.1.0.1", port)
        frontend = Frontend(f"10.0.0.{number}", 80, Protocol.TCP, backends=(backend,))
        return Service(f"s{number}", (frontend,))

    source, looked_at = Source(maps), []

    def note(desired: Desired, *rest: Any) -> Any:
        looked_at.append([found.name for found in desired.services])
        return expand(desired, *rest)

    monkeypatch.setattr("sockhop.agent.sync.expand", note)
    services = {number: service(number, 80) for number in range(1, 6)}
    source.run(Desired(tuple(services.values())), {})
    looked_at.clear()
    services[2] = service(2, 81)
    del services[4]
    services[5] = service(5, 80)  # another object, and equal
    source.run(Desired(tuple(services.values())), {})
    assert looked_at == [["s2", "s4"], ["s2"]]
    check(maps, expand(Desired(tuple(services.values())), HOME))
