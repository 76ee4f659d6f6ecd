"""Other tools at the same hooks: named, not displaced, and not run beside unless asked for."""

import ipaddress
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sockhop.agent import coexist
from sockhop.datapath.balancer import HOOKS
from sockhop.kernel._libbpf import lib
from sockhop.kernel.cgroups import AttachType, groups_below
from tests.clients.bpftool import bpftool
from tests.kernel.attaching import NO_LINKS, Stranger, connects, on_cgroup, running_agent
from tests.sandbox import SOCKHOP, Sandbox, ServerThread, compact, publish, wait_until

pytestmark = pytest.mark.kernel

VIP = "10.0.0.10"
MULTI = lib.BPF_F_ALLOW_MULTI


@pytest.fixture
def server() -> Iterator[ServerThread]:
    with ServerThread("one", "127.0.0.1") as made:
        yield made


@pytest.fixture
def manifest(sandbox: Sandbox, server: ServerThread) -> Path:
    web = {"frontends": [f"{VIP}:80"], "backends": [server.endpoint]}
    return sandbox.manifest(compact(web=web))


@pytest.fixture
def stranger(sandbox: Sandbox) -> Iterator[Stranger]:
    made = Stranger(sandbox.directory)
    yield made
    made.close()


@pytest.fixture
def child(sandbox: Sandbox) -> Iterator[Path]:
    path = sandbox.cgroup / "child"
    path.mkdir()
    yield path
    path.rmdir()


def others(sandbox: Sandbox, *arguments: str) -> list[dict[str, Any]]:
    """What `sockhop status` says of other tools."""
    result = sandbox.sockhop("status", "-o", "json", *arguments, check=False)
    found: list[dict[str, Any]] = json.loads(result.stdout)["others"]
    return found


# --- the refusal ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hook", "is_below", "flags"),
    [
        (AttachType.CONNECT4, False, MULTI),
        (AttachType.CONNECT4, True, 0),
        (AttachType.SENDMSG4, True, MULTI),
    ],
    ids=["here", "below without flags", "sendmsg below"],
)
def test_a_rival_is_refused(
    sandbox: Sandbox,
    manifest: Path,
    stranger: Stranger,
    child: Path,
    hook: AttachType,
    is_below: bool,
    flags: int,
) -> None:
    at = child if is_below else sandbox.cgroup
    number = stranger.attach(at, hook, flags)
    result = sandbox.sockhop("agent", "-f", str(manifest), check=False)
    assert result.returncode == 3
    tag = bpftool("prog", "show", "id", str(number))["tag"]
    assert f"{hook.hook} program {number} 'other_{hook.hook}' (tag {tag}) at {at}" in result.stderr
    assert "--coexist" in result.stderr
    assert on_cgroup(at) == {hook.hook: (number,)}
    assert not sandbox.pins.exists()
    assert others(sandbox)[0].items() >= {"id": number, "cgroup": str(at), "tag": tag}.items()


REFUSE_NOBODY = """
from sockhop.agent import agent
agent.refuse_rivals = lambda *_, **__: None
from sockhop.cli.main import main
main()
"""


def test_without_the_refusal_a_rival_is_noticed(
    sandbox: Sandbox, manifest: Path, stranger: Stranger
) -> None:
    """The mutant: it starts, and so fails the test above."""
    stranger.attach(sandbox.cgroup, AttachType.CONNECT4, MULTI)
    log = sandbox.directory / "mutant.log"
    with log.open("wb") as out:
        command = (sys.executable, "-c", REFUSE_NOBODY, "agent", "-f", str(manifest))
        process = subprocess.Popen(
            sandbox.inside(*command), env=sandbox.environment, stdout=out, stderr=out
        )
    try:
        wait_until(lambda: connects(VIP), "an agent that runs beside its rival", 20)
    finally:
        process.terminate()
        process.wait(20)


def test_a_rival_that_comes_later_keeps_an_agent_from_starting_again(
    sandbox: Sandbox, manifest: Path, stranger: Stranger
) -> None:
    with sandbox.agent(manifest) as agent:
        agent.stop()
    stranger.attach(sandbox.cgroup, AttachType.CONNECT4, MULTI)
    before = on_cgroup(sandbox.cgroup)
    publish(manifest, compact())
    assert sandbox.sockhop("agent", "-f", str(manifest), check=False).returncode == 3
    assert on_cgroup(sandbox.cgroup) == before
    assert connects(VIP)


# --- what is no reason to refuse ------------------------------------------------------------------


def test_filters_and_programs_above_are_named_only(
    sandbox: Sandbox, manifest: Path, stranger: Stranger, child: Path
) -> None:
    stranger.attach(sandbox.cgroup, AttachType.CONNECT4, MULTI)
    stranger.attach(child, AttachType.EGRESS)
    stranger.attach(child, AttachType.BIND4, MULTI)
    with sandbox.agent(manifest, "--cgroup", str(child)):
        found = {other["name"]: other for other in others(sandbox)}
    above = found["other_connect4"]
    assert (above["cgroup"], above["place"], above["order"]) == (
        str(sandbox.cgroup),
        "above",
        "after",
    )
    assert above["meaning"] == "runs after ours and sees the backend's address, not the frontend's"
    assert found["other_egress"]["hook"] == "egress"
    assert "packets, which carry the backend's address" in found["other_egress"]["meaning"]
    assert found["other_bind4"]["order"] == "before"
    assert len(found) == 3
    text = sandbox.sockhop("status", check=False).stdout
    assert f"egress #{found['other_egress']['id']} other_egress (tag " in text


def test_coexisting_says_in_which_order_they_run(
    sandbox: Sandbox, manifest: Path, stranger: Stranger, child: Path
) -> None:
    stranger.attach(sandbox.cgroup, AttachType.CONNECT4, MULTI)
    stranger.attach(child, AttachType.SENDMSG4)
    stranger.attach(child, AttachType.CONNECT4, MULTI)
    with sandbox.agent(manifest, "--coexist") as agent:
        stranger.attach(sandbox.cgroup, AttachType.GETPEERNAME4, MULTI)
        found = {(other["hook"], other["place"]): other["order"] for other in others(sandbox)}
        assert "beside ours: connect4 program" in agent.log.read_text()
        assert connects(VIP)
        assert stranger.forbids()
    assert found == {
        ("connect4", "here"): "before",
        ("connect4", "below"): "before",
        ("sendmsg4", "below"): "before",
        ("getpeername4", "here"): "after",
    }
    lines = [line for line in sandbox.sockhop("status", check=False).stdout.splitlines()
             if line.startswith("other tool")]  # fmt: skip
    assert len(lines) == 3
    assert any("at " in line and "and 1 more: runs before ours" in line for line in lines)


def test_without_links_the_program_below_runs_instead(
    sandbox: Sandbox, manifest: Path, stranger: Stranger, child: Path
) -> None:
    stranger.attach(child, AttachType.CONNECT4)
    with running_agent(sandbox, manifest, "--coexist", prefix=NO_LINKS):
        (found,) = others(sandbox)
        assert found["order"] == "instead"
        assert "the processes there are not balanced" in found["meaning"]
        assert connects(VIP)
        enter(child)
        assert not connects(VIP)
        enter(sandbox.cgroup)


def test_a_program_above_that_yields_does_not_run(
    sandbox: Sandbox, manifest: Path, stranger: Stranger, child: Path
) -> None:
    stranger.attach(sandbox.cgroup, AttachType.CONNECT4, lib.BPF_F_ALLOW_OVERRIDE)
    (found,) = others(sandbox, "--cgroup", str(child))
    assert found["order"] == "hidden"
    with sandbox.agent(manifest, "--cgroup", str(child)):
        (found,) = others(sandbox)
        assert (found["place"], found["order"]) == ("above", "hidden")
        assert stranger.forbids()
        enter(child)
        assert not stranger.forbids()
        assert connects(VIP)
        enter(sandbox.cgroup)


def enter(cgroup: Path) -> None:
    (cgroup / "cgroup.procs").write_text(str(os.getpid()))


def test_a_walk_is_bounded_and_says_so(
    sandbox: Sandbox, child: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sockhop.datapath import neighbours
    from sockhop.datapath.balancer import survey

    assert [path for path, _ in groups_below(sandbox.cgroup)] == [sandbox.cgroup, child]
    assert len(list(groups_below(sandbox.cgroup, limit=1))) == 1
    assert survey(sandbox.pins, sandbox.cgroup).is_complete
    monkeypatch.setattr(neighbours, "GROUPS_MAX", 2)
    assert not survey(sandbox.pins, sandbox.cgroup).is_complete
    with pytest.MonkeyPatch.context() as heard:
        said: list[str] = []
        heard.setattr(coexist._LOG, "warning", said.append)
        coexist.refuse_rivals(survey(sandbox.pins, sandbox.cgroup), coexist=False)
    assert "too many cgroups" in said[0]


# --- Cilium ---------------------------------------------------------------------------------------


@pytest.fixture
def private_bpffs() -> Iterator[tuple[str, ...]]:
    """The prefix of commands that see a bpffs of their own at /sys/fs/bpf."""
    script = "mount -t bpf bpf /sys/fs/bpf && mkdir -p /sys/fs/bpf/tc/globals && echo && exec cat"
    holder = subprocess.Popen(
        ["unshare", "-m", "sh", "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert holder.stdin
    assert holder.stdout
    assert holder.stdout.readline() == b"\n"
    yield ("nsenter", f"--mount=/proc/{holder.pid}/ns/mnt")
    holder.stdin.close()
    holder.wait(10)
    holder.stdout.close()


Serve = Callable[[str, int, int, int], None]


@pytest.fixture
def cilium(private_bpffs: tuple[str, ...]) -> Serve:
    """Writes what Cilium would: a service's entry at address, port, protocol and slot."""

    def run(*command: str) -> None:
        subprocess.run([*private_bpffs, "bpftool", *command], check=True, timeout=20)

    for family, size in ((4, 12), (6, 24)):
        run("map", "create", f"/sys/fs/bpf/tc/globals/cilium_lb{family}_services_v2", "type",
            "hash", "key", str(size), "value", "12", "entries", "64", "name", "lb",
            "flags", "1")  # fmt: skip

    def serve(address: str, port: int, protocol: int, slot: int = 0) -> None:
        packed = ipaddress.ip_address(address)
        key = packed.packed + port.to_bytes(2, "big") + slot.to_bytes(2, sys.byteorder)
        key += bytes((protocol, 0, 0, 0))
        run("map", "update", "pinned",
            f"/sys/fs/bpf/tc/globals/cilium_lb{packed.version}_services_v2",
            "key", *map(str, key), "value", *["0"] * 12)  # fmt: skip

    return serve


def test_frontends_of_cilium_are_left_to_it(
    sandbox: Sandbox,
    server: ServerThread,
    stranger: Stranger,
    private_bpffs: tuple[str, ...],
    cilium: Serve,
) -> None:
    stranger.attach(sandbox.cgroup, AttachType.CONNECT4, MULTI)
    cilium("10.0.0.10", 80, 6, 0)
    cilium("10.0.0.10", 80, 17, 1)  # a backend of it, not a service
    cilium("10.0.0.11", 80, 0, 0)  # any protocol, as before protocols were told apart
    cilium("fd00::10", 80, 6, 0)
    addresses = ("10.0.0.10", "10.0.0.11", "10.0.0.12", "[fd00::10]")
    web = {"frontends": [f"{a}:80/tcp+udp" for a in addresses], "backends": [server.endpoint]}
    manifest = sandbox.manifest(compact(web=web))

    def installed() -> set[str]:
        result = sandbox.run(*private_bpffs, str(SOCKHOP), "get", "services", "-o", "json")
        return {row["frontend"] for row in json.loads(result.stdout)}

    with running_agent(sandbox, manifest, "--coexist", prefix=private_bpffs) as agent:
        kept = {"10.0.0.10:80/udp", "10.0.0.12:80/tcp", "10.0.0.12:80/udp", "[fd00::10]:80/udp"}
        assert installed() == kept
        assert set(agent_warnings(sandbox, private_bpffs)) == {
            f"service web: {frontend} is left to Cilium"
            for frontend in (
                *("10.0.0.10:80/tcp", "10.0.0.11:80/tcp", "10.0.0.11:80/udp"),
                "[fd00::10]:80/tcp",
            )
        }
        assert "is left to Cilium" in agent.log.read_text()
        assert connects("10.0.0.12")
        assert not connects("10.0.0.10")
        # Cilium goes on; its maps say so, and no file changes.
        cilium("10.0.0.12", 80, 6, 0)
        wait_until(lambda: installed() == kept - {"10.0.0.12:80/tcp"}, "one more to be left")


def agent_warnings(sandbox: Sandbox, prefix: tuple[str, ...]) -> list[str]:
    result = sandbox.run(*prefix, str(SOCKHOP), "status", "-o", "json", check=False)
    found: list[str] = json.loads(result.stdout)["agent"]["source"]["warnings"]
    return found


def test_an_unknown_layout_of_ciliums_maps_is_an_error(
    sandbox: Sandbox, manifest: Path, private_bpffs: tuple[str, ...]
) -> None:
    subprocess.run(
        [*private_bpffs, "bpftool", "map", "create",
         "/sys/fs/bpf/tc/globals/cilium_lb4_services_v2", "type", "hash", "key", "16",
         "value", "12", "entries", "4", "name", "lb"],
        check=True, timeout=20,
    )  # fmt: skip
    command = (*private_bpffs, str(SOCKHOP), "agent", "-f", str(manifest), "--coexist")
    result = sandbox.run(*command, check=False)
    assert result.returncode == 3
    assert "cilium_lb4_services_v2: keys of 16 bytes, not 12" in result.stderr
    assert not on_cgroup(sandbox.cgroup, HOOKS)
