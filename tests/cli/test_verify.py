"""`sockhop verify` notices whatever is wrong in the kernel, and nothing else."""

import itertools
import json
import os
import random
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import msgspec
import pytest

from sockhop.agent import verify as verify_module
from sockhop.agent.desired import want
from sockhop.agent.installer import Installer
from sockhop.agent.plan import make_plan
from sockhop.agent.soundness import Finding
from sockhop.agent.target import Target, expand
from sockhop.datapath.balancer import BalanceMaps, Balancer, link_directory, remove_pins
from sockhop.datapath.records import (
    FRONTEND_TYPES,
    Client,
    ClientKey,
    ServiceRecord,
    SlotKey,
    word,
)
from sockhop.kernel._libbpf import ffi, lib
from sockhop.kernel.bpffs import lock_directory
from sockhop.kernel.cgroups import open_cgroup
from sockhop.kernel.maps import Map, open_pinned
from sockhop.kernel.netns import current_cookie
from sockhop.model import (
    Algorithm,
    Backend,
    Desired,
    Frontend,
    Protocol,
    Service,
)
from tests.agent.churn import VIP, Loop, random_state
from tests.cli.damage import (
    LOCAL,
    WEB,
    a_backend_has_another_id,
    a_backend_has_another_state,
    a_backend_has_no_known_protocol,
    a_backend_has_no_known_state,
    a_backend_is_gone,
    a_backend_is_there_twice,
    a_block_has_another_key,
    a_block_of_the_table_is_gone,
    a_block_of_the_table_is_wrong,
    a_cgroup_is_neither_served_nor_excluded,
    a_frontend_excludes_a_cgroup,
    a_frontend_has_another_key,
    a_frontend_has_another_service,
    a_frontend_has_no_known_type,
    a_frontend_has_no_service,
    a_frontend_has_unknown_flags,
    a_frontend_is_gone,
    a_frontend_is_reserved,
    a_frontend_is_too_much,
    a_frontend_remembers_clients,
    a_load_is_gone,
    a_service_is_gone,
    a_slot_has_another_address,
    a_slot_has_another_backend,
    a_slot_has_another_key,
    a_slot_has_no_weight,
    a_slot_is_gone,
    a_slot_is_taken_too_often,
    a_slot_of_a_table_is_gone,
    nothing_leads_to_the_namespace,
    slot,
    the_word_counts_one_less,
    the_word_counts_one_more,
    the_word_has_another_algorithm,
    the_word_has_no_known_algorithm,
    the_word_is_empty,
    the_word_is_of_another_generation,
)
from tests.sandbox import Agent, Sandbox, ServerThread, compact, publish, wait_until

pytestmark = pytest.mark.kernel

MANIFEST = compact(
    web={"frontends": ["10.96.0.10:80"],
         "backends": ["10.1.0.2:80", {"address": "10.1.0.3:80", "weight": 3}]},
    spread={"frontends": ["10.96.0.11:80"], "algorithm": "maglev",
            "backends": ["10.1.0.4:80", "10.1.0.5:80"]},
    least={"frontends": ["[fd00::10]:80"], "algorithm": "least-connections",
           "backends": ["[fd00::2]:80"]},
    local={"frontends": ["127.96.0.1:80"], "backends": ["127.0.0.1:7001"]},
)  # fmt: skip
SMALL = ("frontends=64", "slots=64", "tables=64", "backends=64", "services=64", "live=64")
SIZES = [argument for size in SMALL for argument in ("--map-size", size)]


class Node(NamedTuple):
    sandbox: Sandbox
    agent: Agent
    maps: BalanceMaps


@pytest.fixture(scope="module")
def node() -> Iterator[Node]:
    with (
        Sandbox() as made,
        made.agent(made.manifest(MANIFEST), *SIZES) as agent,
        BalanceMaps(made.pins) as maps,
    ):
        yield Node(made, agent, maps)


def verify(sandbox: Sandbox, *arguments: str) -> tuple[int, dict[str, Any]]:
    result = sandbox.sockhop("verify", "-o", "json", *arguments, check=False)
    assert not result.stderr
    return result.returncode, json.loads(result.stdout)


def differences(sandbox: Sandbox, *arguments: str) -> list[str]:
    status, verdict = verify(sandbox, *arguments)
    assert status == bool(verdict["differences"])
    order = ("check", "where", "expected", "found")
    return [" | ".join(found[field] for field in order) for found in verdict["differences"]]


def all_maps(maps: BalanceMaps) -> list[Map[Any, Any]]:
    return [maps.settings, maps.frontends, maps.words, maps.slots, maps.tables, maps.backends,
            maps.services, maps.clients, maps.loads, maps.live]  # fmt: skip


@contextmanager
def restored(maps: BalanceMaps) -> Iterator[None]:
    """Put back what the body does to the maps."""
    before = [(each, dict(each.items())) for each in all_maps(maps)]
    try:
        yield
    finally:
        for each, entries in before:
            now = dict(each.items())
            each.delete_many(now.keys() - entries.keys())
            each.update_many((k, v) for k, v in entries.items() if now.get(k) != v)


@pytest.mark.parametrize(
    ("damage", "finding"),
    [
        (a_slot_is_gone, "installed | web {web}: slot 1 | a backend | nothing"),
        (a_slot_of_a_table_is_gone, "installed | spread {spread}: slot 0 | a backend | nothing"),
        (a_slot_has_another_backend, "installed | web {web}: slot 0 | a backend of the service"),
        (a_slot_has_another_address,
         "installed | web {web}: slot 0 | 10.1.0.2:80 weight 1 active | 10.1.0.3:80 weight 1"),
        (a_slot_has_another_key, "installed | web {web}: slot 0: repeated key"),
        (a_slot_is_taken_too_often,
         "installed | web {web}: slot 0: share | keep 2147483647, alias 1 | keep 4294967295"),
        (a_slot_has_no_weight, "installed | web {web}: slot 0 | a weight above 0 | 0"),
        (the_word_counts_one_more, "installed | web {web}: slot 2 | a backend | nothing"),
        (the_word_counts_one_less, "installed | web {web}: word | 2 backends | 1"),
        (the_word_is_of_another_generation, "installed | web {web}: generation | 1 to 1 | 77"),
        (the_word_is_empty, "installed | web {web}: generation | 1 to 1 | 0"),
        (the_word_has_another_algorithm,
         "installed | web {web}: table block 0 | positions of backends | nothing"),
        (the_word_has_no_known_algorithm, "installed | web {web}: algorithm | below 4 | 9"),
        (a_block_of_the_table_is_gone,
         "installed | spread {spread}: table block 3 | positions of backends | nothing"),
        (a_block_of_the_table_is_wrong,
         "installed | spread {spread}: table block 3 | what maglev gives | something else"),
        (a_block_has_another_key, "installed | spread {spread}: table block 3: repeated key"),
        (a_load_is_gone,
         "installed | least [fd00::10]:80/tcp: slot 0 | a load to count in | none"),
        (a_frontend_is_gone,
         "desired | web {web} | random of 10.1.0.2:80, 10.1.0.3:80*3 | nothing"),
        (a_frontend_is_too_much,
         "installed | web 10.96.0.10:81/tcp: id | one of its own | that of {web}"),
        (a_frontend_has_another_key, "installed | web {web}: repeated key"),
        (a_frontend_has_no_service, "installed | ? {web}: service | one that is known | id 99"),
        (a_frontend_has_another_service,
         "desired | web {web} | service web | service spread"),
        (a_frontend_has_no_known_type,
         f"installed | web {{web}}: type | below {len(FRONTEND_TYPES)} | 200"),
        (a_frontend_has_unknown_flags, "installed | web {web}: flags"),
        (a_frontend_is_reserved, "desired | web {web} | flags 0 | flags 4"),
        (a_frontend_remembers_clients, "desired | web {web} | affinity 0 | affinity 60"),
        (nothing_leads_to_the_namespace, "general entry | one that leads here | none"),
        (a_frontend_excludes_a_cgroup, "installed | web {web}: flags | CLIENTS"),
        (a_cgroup_is_neither_served_nor_excluded,
         "installed | web {web}: clients | served or excluded | 9"),
        (a_backend_is_gone, "desired | web backend 10.1.0.3:80/tcp | active, weight 3 | nothing"),
        (a_backend_has_another_state, "desired | web backend 10.1.0.3:80/tcp | active, weight 3 | "
                                      "quarantined, weight 3"),
        (a_backend_has_no_known_state, "| a state below 4 | 99"),
        (a_backend_has_no_known_protocol, "| a known protocol | 99"),
        (a_backend_has_another_id, "| id 99"),
        (a_backend_is_there_twice, "| a backend of its own | that of id"),
        (a_service_is_gone, "installed | ? {web}: service | one that is known"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)  # fmt: skip
def test_damage_is_noticed(
    node: Node,
    monkeypatch: pytest.MonkeyPatch,
    damage: Callable[[BalanceMaps], None],
    finding: str,
) -> None:
    sandbox, path = node.sandbox, node.sandbox.directory / "services.yaml"
    monkeypatch.setattr(verify_module, "_PAUSE", 0)
    with restored(node.maps):
        damage(node.maps)
        verdict = verify_module.verify(
            sandbox.pins, sandbox.cgroup, lambda: want([path], None).target
        )
    found = [" | ".join(msgspec.structs.astuple(each)) for each in verdict.differences]
    wanted = finding.format(web="10.96.0.10:80/tcp", spread="10.96.0.11:80/tcp")
    assert any(wanted in line for line in found), "\n".join([wanted, *found])


def test_all_as_it_should_be(node: Node) -> None:
    status, verdict = verify(node.sandbox)
    assert (status, verdict["differences"], verdict["notes"]) == (0, [], [])
    assert verdict["compared"] == {"frontends": 5, "backends": 6, "hooks": 13, "sockets": 0}
    said = node.sandbox.sockhop("verify").stdout
    assert said == "all as it should be: 5 frontends, 6 backends, 13 hooks, 0 sockets\n"


def test_orphans_are_no_difference(node: Node) -> None:
    maps = node.maps
    with restored(maps):
        key, record = slot(maps, WEB)
        maps.slots.set(key._replace(generation=99), record)
        maps.tables.set(SlotKey(key.frontend, 99, 0), next(iter(maps.tables.items()))[1])
        maps.words.set(60, word(1, Algorithm.RANDOM, 1))
        maps.clients.set(ClientKey(1, 60), Client.SERVED)
        maps.services.set(60, ServiceRecord(b"nobody"))
        status, verdict = verify(node.sandbox)
    assert (status, verdict["differences"]) == (0, [])
    assert verdict["notes"] == [
        f"map {name}: 1 that nothing leads to"
        for name in ("words", "slots", "tables", "clients", "services")
    ]


def test_live_counts_that_are_too_low(node: Node) -> None:
    def lower(_: BalanceMaps) -> None:
        key, count = next((k, n) for k, n in node.maps.live.items() if n)
        node.maps.live.set(key, count - 1)

    with (
        socket.create_server(("127.0.0.1", 7001)),
        socket.create_connection((LOCAL, 80)),
        socket.create_connection((LOCAL, 80)),
    ):
        assert differences(node.sandbox) == []
        assert verify(node.sandbox)[1]["compared"]["sockets"] == 2
        with restored(node.maps):
            lower(node.maps)
            found = differences(node.sandbox)
            assert len(found) == 1
            assert found[0].startswith("live | local backend id ")
            assert found[0].endswith(" | 2 or more sockets counted | 1")
        with restored(node.maps):
            node.maps.live.delete(next(k for k, n in node.maps.live.items() if n))
            assert differences(node.sandbox)[0].endswith(" | 2 or more sockets counted | 0")
        with restored(node.maps):
            # Too high is no difference: it comes down by itself.
            key, count = next((k, n) for k, n in node.maps.live.items() if n)
            node.maps.live.set(key, count + 5)
            assert differences(node.sandbox) == []


def test_bypass_is_a_note(node: Node) -> None:
    node.sandbox.sockhop("bypass", "on")
    try:
        status, verdict = verify(node.sandbox)
    finally:
        node.sandbox.sockhop("bypass", "off")
    assert (status, verdict["notes"]) == (0, ["bypass is on: nothing is balanced"])


def test_manifests_by_name(node: Node) -> None:
    less = {"frontends": ["10.96.0.10:80"], "backends": ["10.1.0.2:80"]}
    other = node.sandbox.manifest(compact(web=less), "other.yaml")
    found = differences(node.sandbox, "-f", str(other))
    assert ("desired | web 10.96.0.10:80/tcp | random of 10.1.0.2:80 | "
            "random of 10.1.0.2:80, 10.1.0.3:80*3") in found  # fmt: skip
    assert "desired | web backend 10.1.0.3:80/tcp | nothing | active, weight 3" in found
    assert {line.split(" | ")[0] for line in found} == {"desired"}
    table = node.sandbox.sockhop("verify", "-f", str(other), check=False)
    assert (table.returncode, table.stdout.split()[:2]) == (1, ["CHECK", "WHERE"])
    bad = node.sandbox.sockhop("verify", "-f", "/no/such/file", check=False)
    assert (bad.returncode, "/no/such/file" in bad.stderr) == (2, True)


def test_a_broken_source(node: Node) -> None:
    path = node.sandbox.directory / "services.yaml"
    publish(path, "version: 1\nservices: [nonsense]")
    try:
        found = differences(node.sandbox)
        assert len(found) == 1
        assert found[0].startswith("desired | the agent's sources | manifests | ")
        assert "services.yaml:2" in found[0]
    finally:
        publish(path, MANIFEST)
    wait_until(lambda: not node.agent.status()["source"]["error"], "good sources")
    assert differences(node.sandbox) == []


def test_hooks(sandbox: Sandbox) -> None:
    path = sandbox.manifest(MANIFEST)
    links, other = link_directory(sandbox.pins), sandbox.pins.with_name(f"{sandbox.pins.name}-o")
    with lock_directory(other):
        with sandbox.agent(path, *SIZES), Balancer(other) as stranger:
            # A program that uses maps of its own, in the link that is ours.
            link = open_pinned(links / "connect4")
            program = stranger._object.program("sockhop_connect4")
            assert lib.bpf_link_update(link, program, ffi.NULL) == 0
            os.close(link)
            (links / "recvmsg6").unlink()
            found = differences(sandbox)
            assert [line.split(" #")[0] for line in found] == [
                "hooks | recvmsg6 | a program of ours | none",
                "hooks | connect4 | a program of ours | program",
            ]
        with sandbox.agent(path):
            assert differences(sandbox) == []
        remove_pins(other)
    sandbox.sockhop("detach")
    result = sandbox.sockhop("verify", check=False)
    assert (result.returncode, "nothing is installed" in result.stderr) == (3, True)


def test_without_an_agent(sandbox: Sandbox) -> None:
    path = sandbox.manifest(MANIFEST)
    agent = sandbox.start_agent("-f", str(path), *SIZES).wait_ready()
    agent.stop(signal.SIGKILL)
    status, verdict = verify(sandbox)
    assert (status, verdict["differences"]) == (0, [])
    assert verdict["notes"] == ["no agent runs and no -f is given: not compared with manifests"]
    assert differences(sandbox, "-f", str(path)) == []


def test_a_socket_whose_backend_is_gone(sandbox: Sandbox) -> None:
    def state(*backends: str) -> str:
        return compact(web={"frontends": ["10.96.0.10:80"], "backends": list(backends)})

    path = sandbox.manifest(state("127.0.0.1:7001", "127.0.0.1:7002"))
    with sandbox.agent(path, *SIZES) as agent, ServerThread("one", "127.0.0.1", 7001):
        publish(path, state("127.0.0.1:7001"))
        agent.wait_generation(1)
        with socket.create_connection(("10.96.0.10", 80)) as client:
            assert differences(sandbox) == []
            publish(path, state("127.0.0.1:7002"))
            agent.wait_generation(2)
            found = differences(sandbox)
            local = ":".join(map(str, client.getsockname()))
            assert len(found) == 1
            assert found[0].startswith(f"live | socket {local}>127.0.0.1:7001/tcp, cookie ")
            assert found[0].endswith(" | a backend of web | 127.0.0.1:7001, which is gone")
            # One that is back is its backend again, though it has another id.
            publish(path, state("127.0.0.1:7001", "127.0.0.1:7002"))
            agent.wait_generation(3)
            assert differences(sandbox) == []


def test_reading_meets_changes_which_are_no_differences(
    sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    def state(number: int) -> Target:
        backends = tuple(Backend(f"10.1.{number}.{i}", 80) for i in range(2 + number))
        frontends = tuple(Frontend("10.9.0.1", port, Protocol.TCP, backends=backends)
                          for port in range(1, 100))  # fmt: skip
        return expand(Desired((Service("web", frontends),)), current_cookie())

    def change() -> None:
        for number in itertools.cycle([0, 1]):
            if stop.is_set():
                return
            installer.apply(make_plan(state(number), installer.installed))

    def findings(looks: int) -> list[Finding]:
        monkeypatch.setattr(verify_module, "_LOOKS", looks)
        return verify_module.verify(sandbox.pins, sandbox.cgroup, None).differences

    stop = threading.Event()
    sandbox.pins.mkdir(mode=0o700)
    with Balancer(sandbox.pins) as balancer, open_cgroup(sandbox.cgroup) as cgroup:
        balancer.attach(cgroup)
        installer = Installer(balancer.maps)
        thread = threading.Thread(target=change)
        thread.start()
        try:
            assert not [found for _ in range(3) for found in findings(3)]
            # One look would not do.
            assert any(findings(1) for _ in range(50))
        finally:
            stop.set()
            thread.join()


def test_no_false_alarm_while_everything_changes(sandbox: Sandbox) -> None:
    chance = random.Random(5)
    with ServerThread("one", "10.96.0.1") as one, ServerThread("two", "10.96.0.1") as two:
        servers = [one, two]
        path = sandbox.manifest(random_state(chance, servers))
        with sandbox.agent(path):
            loop = Loop(VIP)
            try:
                for _ in range(4):
                    publish(path, random_state(chance, servers))
                    found = differences(sandbox)
                    assert not [line for line in found if not line.startswith("desired")]
            finally:
                loop.stop()
            assert not loop.failures
            wait_until(lambda: not differences(sandbox), "the last state, and nothing else", 20)
