"""Pinned maps outlive a version: what the next one may take over, and what it says if it can't."""

import os
import re
from pathlib import Path

import pytest

from sockhop.datapath.attachment import Owner, attach_hooks
from sockhop.datapath.balancer import (
    HOOKS,
    SIZED_MAPS,
    Balancer,
    OtherVersion,
    check_version,
    link_directory,
    map_directory,
)
from sockhop.datapath.records import ABI, Setting
from sockhop.kernel.btf import Layouts
from sockhop.kernel.cgroups import open_cgroup
from sockhop.kernel.maps import U32, U64, Map, map_info, open_pinned
from sockhop.kernel.objects import BpfObject, object_path
from tests.agent.test_agent import ask
from tests.mutants import mutant
from tests.sandbox import Sandbox, ServerThread, compact

pytestmark = pytest.mark.kernel

HEADER = Path(__file__).parents[2] / "bpf/sockhop.h"
KNOWN = Path(__file__).with_name("abi.txt")
ANY_SIZE = {name for sized, others in SIZED_MAPS.items() for name in (sized, *others)}


def layout(pins: Path) -> str:
    """All that a program relies on that meets the maps of another one, as text."""
    lines = [f"ABI {ABI}"]
    for pin in sorted(map_directory(pins).iterdir()):
        fd = open_pinned(pin)
        info = map_info(fd)
        os.close(fd)
        size = "any" if pin.name in ANY_SIZE else info.max_entries
        lines.append(f"map {pin.name}: {info.type} {info.key_size} {info.value_size} {size}")
    layouts = Layouts(object_path("balance"))
    for name in sorted(re.findall(r"^struct (\w+) {", HEADER.read_text(), re.MULTILINE)):
        try:
            members = layouts.members(name)
        except ValueError:  # no program uses it
            continue
        lines.append(
            f"struct {name}: " + " ".join(f"{m.name}@{m.offset}:{m.code}" for m in members)
        )
    return "\n".join(lines) + "\n"


def test_maps_that_differ_have_another_abi(sandbox: Sandbox) -> None:
    """If this fails: SOCKHOP_ABI and ABI one higher, and what is printed becomes abi.txt.

    A map more needs no other number; it is protected from when it stands in abi.txt.
    """
    sandbox.pins.mkdir(mode=0o700)
    with Balancer(sandbox.pins):
        found = layout(sandbox.pins)
    print(found)
    assert sorted(set(KNOWN.read_text().splitlines()) - set(found.splitlines())) == []
    assert f"#define SOCKHOP_ABI {ABI}\n" in HEADER.read_text()


@pytest.fixture
def older(sandbox: Sandbox, tmp_path: Path) -> Sandbox:
    """A sandbox in which a version with the ABI before has installed maps of another layout."""
    path = mutant(
        tmp_path,
        "balance",
        ("#define ROOM 64", "#define ROOM 16"),
        ("\t__u64 since; /* CLOCK_BOOTTIME, ns */\n\t__u64 netns; /* cookie */",
         "\t__u64 since;\n\t__u64 more;\n\t__u64 netns;"),
    )  # fmt: skip
    maps, links = map_directory(sandbox.pins), link_directory(sandbox.pins)
    for directory in (maps, links):
        directory.mkdir(parents=True)
    with BpfObject(path, pins=maps) as loaded, open_cgroup(sandbox.cgroup) as cgroup:
        with Map(open_pinned(maps / "settings"), U32, U64) as settings:
            settings.set(Setting.ABI, ABI - 1)
        programs = {hook: loaded.program(f"sockhop_{hook.hook}") for hook in HOOKS}
        attach_hooks(programs, cgroup, links, Owner(maps))
    return sandbox


def test_over_another_version_it_says_what_to_do(older: Sandbox) -> None:
    """Its own `detach` included, which ends what the other version has installed."""
    with ServerThread("one", "10.96.0.1") as server:
        path = older.manifest(
            compact(web={"frontends": ["10.0.0.10:80"], "backends": [server.endpoint]})
        )
        commands = (
            ["agent", "-f", str(path)], ["status"], ["get", "services"], ["get", "policies"],
            ["get", "sockets"], ["plan", "-f", str(path)], ["verify", "-f", str(path)],
            ["explain", "10.0.0.10:80"], ["bypass", "on"],
        )  # fmt: skip
        for command in commands:
            result = older.sockhop(*command, check=False)
            assert result.returncode == 3, command
            assert f"ABI {ABI - 1}, those of this version {ABI}" in result.stderr, command
            assert "`sockhop detach` and then start the agent" in result.stderr
        said = older.sockhop("detach").stdout
        assert said.startswith("detached what another version had installed")
        assert not older.pins.exists()
        with older.agent(path):
            assert ask("10.0.0.10") == "one"


def test_a_version_is_known_before_anything_is_loaded(older: Sandbox) -> None:
    before = sorted(map_directory(older.pins).iterdir())
    with pytest.raises(OtherVersion):
        Balancer(older.pins)
    assert sorted(map_directory(older.pins).iterdir()) == before
    check_version(older.pins / "nothing")
