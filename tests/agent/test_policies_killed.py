"""SIGKILL at random moments while policies and redirects change and clients connect.

What counts for a connect are the states that may have been in force: the last one that the agent
had acknowledged before it, and all that were published since.
"""

import bisect
import contextlib
import errno
import os
import random
import signal
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import tests.sandbox
from sockhop.agent.client import ask_agent
from sockhop.errors import SystemLackError
from sockhop.kernel.cgroups import cgroup_root
from tests.agent.test_enforce import error_of, other_objects, redirect
from tests.agent.test_policies import manifest, objects
from tests.clients.bpftool import address_of, map_entries
from tests.sandbox import Agent, Sandbox, ServerThread, publish, wait_until

pytestmark = [pytest.mark.kernel, pytest.mark.timeout(3600)]

KILLS = int(os.environ.get("SOCKHOP_POLICY_KILLS", "2"))
NETS = [f"127.0.{n}" for n in range(10, 16)]
NAME, UPSTREAM, LOCAL = "10.96.0.1", "upstream", "local"
MOST_HELD = 300
_PAUSE = 0.002  # s: the agent is to get somewhere, too


class State(NamedTuple):
    """What is published: the networks that are denied, and whether the name is redirected."""

    number: int
    denied: frozenset[str]
    redirected: bool

    def text(self, cgroup: str) -> str:
        """The manifests. The name of a policy for nobody tells which state it is."""
        mark = {
            "name": f"mark-{self.number}",
            "clients": {"cgroups": ["/nowhere"]},
            "deny": [{"cidr": "192.0.2.0/24"}],
        }
        policies = [
            {"name": f"no-{n}", "deny": [{"cidr": f"{net}.0/24"}]}
            for n, net in enumerate(sorted(self.denied))
        ]
        found = [redirect(cgroup)] if self.redirected else []
        return f"{manifest(mark, *policies)}\n---\n{objects(*found, *other_objects())}\n"


class Seen(NamedTuple):
    """What became of a connect or a question, between two times."""

    began: float
    ended: float
    what: str
    result: str


class Held(NamedTuple):
    """A connected socket, and when it was made."""

    own: socket.socket
    net: str
    began: float


class Clients:
    """Two threads that connect to the networks, and ask the name, all the time."""

    def __init__(self) -> None:
        self.seen: list[Seen] = []
        self.held: list[Held] = []
        self.failures: list[str] = []
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(n,)) for n in range(2)]
        for thread in self._threads:
            thread.start()

    def _run(self, seed: int) -> None:
        chance = random.Random(seed)
        while not self._stop.wait(_PAUSE):
            try:
                if chance.random() < 0.3:
                    self._ask()
                else:
                    self._connect(chance.choice(NETS), keep=chance.random() < 0.02)
            except OSError as error:
                self.failures.append(repr(error))

    def _ask(self) -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
            client.settimeout(10)
            began = time.monotonic()
            client.sendto(b"?", (NAME, 53))
            answer = client.recvfrom(20)[0].decode()
            self.seen.append(Seen(began, time.monotonic(), NAME, answer))

    def _connect(self, net: str, *, keep: bool) -> None:
        client = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        began = time.monotonic()
        error = client.connect_ex((f"{net}.1", 9))
        self.seen.append(Seen(began, time.monotonic(), net, errno.errorcode.get(error, "")))
        if keep and not error and len(self.held) < MOST_HELD:
            self.held.append(Held(client, net, began))
        else:
            client.close()

    def wait_for(self, *results: str) -> None:
        wait_until(lambda: {each.result for each in list(self.seen)}.issuperset(results), "answers")

    def stop(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(20)

    def close(self) -> None:
        self.stop()
        for each in self.held:
            each.own.close()


class World:
    """An agent that is killed, what was published, and what it has acknowledged."""

    def __init__(self, sandbox: Sandbox, seed: int, cgroup: str) -> None:
        self.sandbox = sandbox
        self.chance = random.Random(seed)
        self.published: list[tuple[float, State]] = []
        self.acknowledged: list[tuple[float, int]] = []
        self._cgroup = cgroup
        self.path = sandbox.directory / "state.yaml"
        self.publish(State(0, frozenset(), redirected=False))
        self.agent = self.start().wait_ready()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._listen)
        self._thread.start()
        self.wait_acknowledged()

    def start(self) -> Agent:
        return self.sandbox.start_agent("-f", str(self.path))

    def publish(self, state: State) -> None:
        self.published.append((time.monotonic(), state))
        publish(self.path, state.text(self._cgroup))

    def change(self) -> None:
        denied = frozenset(net for net in NETS if self.chance.random() < 0.5)
        redirected = self.chance.random() < 0.5
        self.publish(State(len(self.published), denied, redirected))
        time.sleep(self.chance.uniform(0, 0.1))

    def kill(self) -> None:
        self.agent.stop(signal.SIGKILL)
        assert "Traceback" not in self.agent.log.read_text()
        self.agent = self.start()
        if self.chance.random() < 0.7:
            self.agent.wait_ready()

    def wait_acknowledged(self) -> None:
        last = self.published[-1][1].number
        wait_until(lambda: self.acknowledged and self.acknowledged[-1][1] == last, "the state", 60)

    def _listen(self) -> None:
        while not self._stop.wait(0.01):
            with contextlib.suppress(SystemLackError):
                if agent := ask_agent(self.sandbox.api):
                    names = [each.name for each in agent.state.policies]
                    number = next(int(n[5:]) for n in names if n.startswith("mark-"))
                    if not self.acknowledged or self.acknowledged[-1][1] < number:
                        self.acknowledged.append((time.monotonic(), number))

    def close(self) -> None:
        self._stop.set()
        self._thread.join(20)

    def possible(self, began: float, ended: float) -> list[State]:
        """The states that may have been in force at some time between two."""
        known = bisect.bisect(self.acknowledged, began, key=lambda each: each[0])
        oldest = self.acknowledged[known - 1][1] if known else 0
        end = bisect.bisect(self.published, ended, key=lambda each: each[0])
        return [state for _, state in self.published[oldest:end]]

    def wrong(self, seen: list[Seen]) -> list[str]:
        """What no state that may have been in force explains."""
        found = []
        for each in seen:
            states = self.possible(each.began, each.ended)
            if each.what == NAME:
                wanted = {LOCAL if s.redirected else UPSTREAM for s in states}
            else:
                wanted = {"EPERM" if each.what in s.denied else "" for s in states}
            if each.result not in wanted:
                found.append(f"{each.what}: {each.result!r}, wanted {wanted}, {len(states)} states")
        return found


@contextlib.contextmanager
def world(sandbox: Sandbox) -> Iterator[tuple[World, Clients]]:
    seed = int(os.environ.get("SOCKHOP_SEED", random.SystemRandom().randrange(1 << 32)))
    print(f"SOCKHOP_SEED={seed}, {KILLS} kills")
    group = sandbox.cgroup / "cache"
    group.mkdir()
    with contextlib.ExitStack() as stack:
        stack.callback(group.rmdir)
        for name, host in ((UPSTREAM, NAME), (LOCAL, "127.0.1.2")):
            stack.enter_context(ServerThread(name, host, 53, udp=True))
        made = World(sandbox, seed, f"/{group.relative_to(cgroup_root())}")
        stack.callback(made.close)
        clients = Clients()
        stack.callback(clients.close)
        yield made, clients


def test_killed_at_random_moments(sandbox: Sandbox) -> None:
    results: Counter[str] = Counter()
    with world(sandbox) as (made, clients):
        clients.wait_for(UPSTREAM)
        for _ in range(KILLS):
            end = time.monotonic() + made.chance.uniform(0, 0.6)
            while time.monotonic() < end:
                made.change()
            made.kill()
            check_seen(made, clients, results)
        last = State(len(made.published), frozenset(NETS[:1]), redirected=True)
        made.publish(last)
        made.wait_acknowledged()
        clients.wait_for("EPERM", "", LOCAL)
        clients.stop()
        check_seen(made, clients, results)
        print(f"{results.total():,} connects and questions, {results['EPERM']:,} denied, "
              f"{results[LOCAL]:,} redirected, {len(made.published)} states, "
              f"{len(made.acknowledged)} acknowledged, {len(clients.held)} held")  # fmt: skip
        check_held(made, clients.held, last)
        made.kill()
        made.agent.wait_ready()
        check_maps(sandbox, last)
        assert made.agent.stop() == 0


def check_seen(made: World, clients: Clients, results: Counter[str]) -> None:
    """What clients have met so far was allowed or denied as it should have been."""
    seen, clients.seen = clients.seen, []
    results.update(each.result for each in seen)
    assert not clients.failures, clients.failures[:5]
    assert made.wrong(seen)[:5] == []


def check_held(made: World, held: list[Held], last: State) -> None:
    """Who may not be there has been ended, and nobody who might always be there."""
    for each in held:
        states = made.possible(each.began, time.monotonic())
        if each.net in last.denied:
            wait_until(lambda h=each: error_of(h.own) or not connected(h.own), "an end")  # type: ignore[misc]
        elif not any(each.net in state.denied for state in states):
            assert connected(each.own), each.net


def connected(own: socket.socket) -> bool:
    with contextlib.suppress(OSError):
        return bool(own.getpeername())
    return False


def check_maps(sandbox: Sandbox, last: State) -> None:
    """The maps hold the last state and nothing else; bpftool says so."""
    pins = sandbox.pins
    denied = {(f"{net}.0", 24, "no-0") for net in last.denied}
    assert installed(pins) == denied | {("0.0.0.0", 0, ""), ("::", 0, "")}
    names = [bytes_of(value["name"]) for _, value in map_entries(pins, "policies")]
    assert sorted(names) == [f"mark-{last.number}", "no-0"]
    fronts = {
        (address_of(k["address"]), k["port"], k["layer"]) for k, _ in map_entries(pins, "frontends")
    }
    assert fronts == {(NAME, 53, 1)}
    (name,) = [bytes_of(value["name"]) for _, value in map_entries(pins, "services")]
    assert name == "kube-system/dns@redirect"
    (backend,) = [value for _, value in map_entries(pins, "backends")]
    assert (address_of(backend["address"]), backend["port"]) == ("127.0.1.2", 53)
    verified = sandbox.sockhop("verify", check=False)
    assert verified.returncode == 0, verified.stdout


def installed(pins: Path) -> set[tuple[str, int, str]]:
    """The networks of the one set of rules, their lengths, and the policy that denies them."""
    names = {key: bytes_of(value["name"]) for key, value in map_entries(pins, "policies")}
    word = dict(map_entries(pins, "policy_settings"))[0]
    clients = map_entries(pins, "policy_clients")
    assert len(clients) == 1
    client, rules = clients[0]
    assert (client["netns"], client["cgroup"], client["epoch"]) == (0, 0, word >> 32)
    classes: dict[int, set[str]] = {}
    for key, value in map_entries(pins, "policy_ports"):
        who = names[value["policy"]] if value["denied"] else ""
        classes.setdefault(key["group"], set()).add(who)
    found, used = set(), set()
    for key, group in map_entries(pins, "policy_networks"):
        assert key["rules"] == rules
        (who,) = classes[group]
        address, length = address_of(key["address"]), key["prefixlen"] - 32
        found.add((address, length - 96 * ("." in address), who))
        used.add(group)
    assert used == classes.keys()
    return found


def bytes_of(characters: Any) -> str:
    """The text of a `char[]`, which bpftool prints as a list or as a text."""
    return "".join(map(str, characters)).rstrip("\0")


MUTANTS = {
    "takes away first": """
def write(self, table, epoch, ids, real=PolicyInstaller._write):
    self._set(PolicySetting.WORD, 0)
    time.sleep(0.005)
    real(self, table, epoch, ids)
PolicyInstaller._write = write
""",
    "leaves things": """
PolicyInstaller._forget = lambda *_: None
""",
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_that(
    name: str, sandbox: Sandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "sockhop"
    program.write_text(
        f"#!{sys.executable}\nimport time\n"
        "from sockhop.agent.policy_installer import PolicyInstaller, PolicySetting\n"
        f"{MUTANTS[name]}\nfrom sockhop.cli.main import main\nmain()\n"
    )
    program.chmod(0o755)
    monkeypatch.setattr(tests.sandbox, "SOCKHOP", program)
    with world(sandbox) as (made, clients):
        last = State(0, frozenset(), redirected=False)
        for number in range(1, 50):
            last = State(number, frozenset(NETS[: number % 2 + 1]), redirected=True)
            made.publish(last)
            made.wait_acknowledged()
            if name == "leaves things" or made.wrong(list(clients.seen)):
                break
        clients.stop()
        if name == "leaves things":
            with pytest.raises(AssertionError):
                check_maps(sandbox, last)
        else:
            assert made.wrong(clients.seen)
