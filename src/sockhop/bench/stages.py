"""How long each step takes from manifests to the kernel's maps."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from sockhop.agent.installer import Installer
from sockhop.agent.plan import make_plan
from sockhop.agent.target import expand
from sockhop.datapath.balancer import Balancer, remove_pins
from sockhop.kernel.bpffs import lock_directory
from sockhop.sources.files import load

__all__ = ["measure_stages"]

T = TypeVar("T")


def measure_stages(manifests: Path, pins: Path) -> dict[str, float]:
    """Do what an agent does at its start, without attaching; return the seconds of each step."""
    seconds: dict[str, float] = {}

    def timed(step: str, do: Callable[[], T]) -> T:
        begin = time.perf_counter()
        result = do()
        seconds[step] = time.perf_counter() - begin
        return result

    loaded = timed("read", lambda: load([manifests]))
    try:
        with lock_directory(pins), timed("load programs", lambda: Balancer(pins)) as balancer:
            installer = timed("read maps", lambda: Installer(balancer.maps))
            target = timed("expand", lambda: expand(loaded.desired, 0))
            plan = timed("plan", lambda: make_plan(target, installer.installed))
            timed("write", lambda: installer.apply(plan))
    finally:
        remove_pins(pins)
    return seconds
