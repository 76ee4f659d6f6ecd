"""Where a fault lies: the way, an echo, other places, kubelet's log."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from sockhop.diagnose.causes import Cause
from sockhop.diagnose.dial import Question
from sockhop.diagnose.doctor import diagnose
from sockhop.diagnose.ping import ping
from sockhop.diagnose.topology import Topology, name_of
from sockhop.kernel import netns
from sockhop.kernel.namespaces import Namespaces
from sockhop.model import pack_address
from tests.diagnose.invoke import sockhop
from tests.diagnose.load import SERVER, Server
from tests.diagnose.test_doctor import NOBODY, causes, origin, rules
from tests.splice.stage import Place, Stage

PROBE = 'prober.go] Readiness probe for POD failed (failure): Get "http://{}/health": context'


@pytest.fixture(scope="module")
def stage() -> Iterator[Stage]:
    with Stage(spliced=False) as made:
        yield made


def question(port: int, path: str = "/health") -> Question:
    return Question(pack_address(SERVER), port, path, 1, 1)


@pytest.mark.kernel
def test_a_filter_is_narrowed_down(stage: Stage) -> None:
    with (
        Server(stage) as server,
        rules(stage.sandbox.netns, f"input iifname near tcp dport {server.port} drop"),
    ):
        found = diagnose(question(server.port), [origin(stage)], NOBODY)
    assert causes(found) == [Cause.FILTERED]
    text = "\n".join(found.evidence)
    assert f"{SERVER} answers to ping from far, in " in text
    inside = f"from {stage.sandbox.name}, which has the address it succeeds"
    assert inside in text
    (way,) = found.ways
    assert str(way) == (
        f"far ({Place.VETH4.client}) sends by far (veth, mtu 1,500), whose other end is near of "
        f"network namespace {netns.inode(stage.sandbox.netns)}"
    )
    assert [each.compared for each in found.dialled][:2] == [False, True]


@pytest.mark.kernel
def test_a_stage_beside_another(stage: Stage) -> None:
    """The same indexes, names and addresses, in other namespaces."""
    with Stage(spliced=False) as other:
        places = Namespaces().all()
        ways = Topology(places, pack_address(SERVER))
        for each in (stage, other):
            (far,) = (place for place in places if place.inode == netns.inode(each.other))
            way = ways.way("far", far)
            assert way
            assert (way.peer, way.owner) == ("near", netns.inode(each.sandbox.netns))


@pytest.mark.kernel
def test_a_server_that_is_silent_is_so_from_everywhere(stage: Stage) -> None:
    with Server(stage, "nothing") as server:
        found = diagnose(question(server.port), [origin(stage)], NOBODY)
    assert causes(found) == [Cause.NOT_ANSWERING]
    text = "\n".join(found.evidence)
    assert "from far TCP connects every time" in text
    assert f"from {stage.sandbox.name}, which has the address 1 of 1 fail, too" in text


@pytest.mark.kernel
@pytest.mark.parametrize("place", [Place.VETH4, Place.VETH6])
def test_ping(stage: Stage, place: Place) -> None:
    far, address = origin(stage).place, pack_address(place.server)
    seconds = ping(far, address)
    assert seconds is not None
    assert 0 < seconds < 1
    with rules(stage.sandbox.netns, "input meta l4proto { icmp, icmpv6 } drop"):
        assert ping(far, address, count=1) is None
    assert ping(far, pack_address("203.0.113.1")) is None


@pytest.mark.kernel
def test_from_all_and_kubelet(stage: Stage, tmp_path: Path) -> None:
    with Server(stage, "nothing") as server:
        target = f"{SERVER}:{server.port}"
        log = tmp_path / "kubelet.log"
        log.write_text("\n".join([PROBE.format(target), PROBE.format("10.0.0.1:80")]))
        told = sockhop(
            stage.sandbox,
            *("doctor", target, "--http", "/health", "--from", "all", "--count", "1"),
            *("--timeout", "300ms", "--kubelet-log", str(log)),
        )
    assert told.returncode == 1
    assert stage.other.name in told.stdout
    assert "kubelet has logged 1 failed probe, the last:\n  prober.go] Readiness" in told.stdout
    assert told.stdout.count("server accepts and does not answer (from ") >= 2
    assert "layer: the server's program" in told.stdout


@contextmanager
def bridged() -> Iterator[dict[str, Path]]:
    """Have a server and a client on a bridge, and a stranger that sends everything elsewhere."""
    names = {each: f"sockhop-test-{os.getpid()}-{each}" for each in ("br", "srv", "cli", "far")}
    with ExitStack() as stack:
        for name in names.values():
            subprocess.run(["ip", "netns", "add", name], check=True)
            stack.callback(subprocess.run, ["ip", "netns", "del", name], check=False)
        lines = ["link add br0 type bridge", "addr add 10.88.0.9/24 dev br0", "link set br0 up"]
        for number, each in enumerate(("srv", "cli"), 1):
            lines += [
                f"link add {each} type veth peer name eth0 netns {names[each]}",
                f"link set {each} master br0 up",
            ]
            inside = (f"addr add 10.88.0.{number}/24 dev eth0", "link set eth0 up")
            for line in lines, inside:
                where = names["br"] if line is lines else names[each]
                for words in line:
                    subprocess.run(["ip", "-n", where, *words.split()], check=True)
            lines = []
        stranger = ("link add d0 type bridge", "addr add 10.99.0.1/24 dev d0", "link set d0 up")
        for words in (*stranger, "route add default via 10.99.0.2"):
            subprocess.run(["ip", "-n", names["far"], *words.split()], check=True)
        yield {each: Path("/run/netns") / name for each, name in names.items()}


@pytest.mark.kernel
def test_only_what_leads_there_is_dialled_from(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a way goes elsewhere, the same address is another's: nothing may be sent there."""
    with bridged() as paths:
        inodes = {each: netns.inode(path) for each, path in paths.items()}
        places = Namespaces().by_inode(set(inodes.values()))
        ways = Topology(places, pack_address("10.88.0.1"))
        assert [each.inode for each in ways.owners()] == [inodes["srv"]]
        assert {each.inode for each in ways.sources()} == {inodes["br"], inodes["cli"]}
        unknown = Topology(places, pack_address("198.51.100.1"))
        assert [each.inode for each in unknown.sources()] == [inodes["far"]]
        (way,) = (ways.way("far", each) for each in places if each.inode == inodes["far"])
        assert (
            str(way) == "far (10.99.0.1) sends by d0 (bridge, mtu 1,500) to the gateway 10.99.0.2"
        )
        assert {name_of(each) for each in places} == {path.name for path in paths.values()}
        # The mutant: a route is enough.
        monkeypatch.setattr(Topology, "_leads", lambda self, place: self._routes[place])
        assert inodes["far"] in {each.inode for each in ways.sources()}
