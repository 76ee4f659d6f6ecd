"""Whatever happens in whatever order, clients are served."""

import os
import random
import signal
import time
from pathlib import Path

import pytest

from tests.agent.churn import Loop, random_state
from tests.clients.bpftool import map_entries
from tests.clients.oracle import served_of, services_of
from tests.sandbox import Agent, Sandbox, ServerThread, publish, wait_until

pytestmark = [pytest.mark.kernel, pytest.mark.timeout(3600)]

STEPS = int(os.environ.get("SOCKHOP_STEPS", "40"))
# An address of the namespace's own: while everything is bypassed, whoever listens there answers.
ADDRESS = "10.96.0.1"


class World:
    """An agent, its manifest, and what can happen to them."""

    def __init__(self, sandbox: Sandbox, seed: int, servers: list[ServerThread]) -> None:
        self.sandbox = sandbox
        self.chance = random.Random(seed)
        self.servers = servers
        self.path = sandbox.manifest(self.state())
        self.agent = self.start().wait_ready()
        self.bypassed = False
        self.loop = Loop(ADDRESS)

    def start(self) -> Agent:
        return self.sandbox.start_agent("-f", str(self.path))

    def state(self) -> str:
        return random_state(self.chance, self.servers, address=ADDRESS)

    def step(self) -> None:
        actions = {self.change: 10, self.kill: 3, self.restart: 2, self.hang_up: 1, self.bypass: 2}
        action = self.chance.choices(list(actions), list(actions.values()))[0]
        action()

    def change(self) -> None:
        publish(self.path, self.state())
        time.sleep(self.chance.uniform(0, 0.05))

    def kill(self) -> None:
        self.agent.stop(signal.SIGKILL)
        assert "Traceback" not in self.agent.log.read_text()
        self.agent = self.start()
        if self.chance.random() < 0.5:
            self.agent.wait_ready()

    def restart(self) -> None:
        """An upgrade: the programs of the new agent take the place of the old ones."""
        self.agent.wait_ready()
        assert self.agent.stop() == 0
        self.agent = self.start().wait_ready()

    def hang_up(self) -> None:
        self.agent.wait_ready()
        self.agent.process.send_signal(signal.SIGHUP)

    def bypass(self) -> None:
        self.agent.wait_ready()
        switch = self.chance.choice(["on", "off"])
        with self.loop.switching():
            self.sandbox.sockhop("bypass", switch)
        if switch == "on":
            self.bypassed = True
            time.sleep(0.05)


def test_interleavings(sandbox: Sandbox, tmp_path: Path) -> None:
    seed = int(os.environ.get("SOCKHOP_SEED", random.SystemRandom().randrange(1 << 32)))
    print(f"SOCKHOP_SEED={seed}, {STEPS} steps")
    with (
        ServerThread("direct", ADDRESS, 80),
        ServerThread("one", ADDRESS) as one,
        ServerThread("two", ADDRESS) as two,
    ):
        world = World(sandbox, seed, [one, two])
        loop = world.loop
        try:
            for _ in range(STEPS):
                world.step()
        finally:
            rate = loop.stop()
        print(f"{loop.answers.total():,} connects, {rate:,.0f} a second, {loop.answers}")
        assert not loop.failures, f"SOCKHOP_SEED={seed}: {loop.failures[:5]}"
        assert rate >= 1000
        for name in ("one", "two", *["direct"] * world.bypassed):
            assert loop.answers[name], name
        settle(world)


def only_last(world: World) -> bool:
    """Whether the change is through: the old slots go last, after the grace period."""
    slots = map_entries(world.sandbox.pins, "slots")
    return len(slots) == 1 and set(services_of(world.sandbox.pins).values()) == {"last"}


def settle(world: World) -> None:
    """A last state is installed, and nothing else."""
    world.agent.wait_ready()
    world.sandbox.sockhop("bypass", "off")
    publish(
        world.path,
        '{"version": 1, "services": [{"name": "last", "frontends": ["10.0.2.1:80"],'
        f' "backends": ["{world.servers[0].endpoint}"]}}]}}',
    )
    wait_until(lambda: only_last(world), "the last state")
    assert {served.service for served in served_of(world.sandbox.pins).values()} == {"last"}
    assert world.sandbox.sockhop("status").returncode == 0
    verified = world.sandbox.sockhop("verify", check=False)
    assert verified.returncode == 0, verified.stdout
    assert world.agent.stop() == 0
