"""Replacing what is attached: no client ever meets neither program."""

import json
import signal
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import pytest

from sockhop.datapath.attachment import Owner, attach_hooks
from sockhop.datapath.balancer import (
    HOOKS,
    Balancer,
    attached_hooks,
    link_directory,
    map_directory,
    remove_pins,
)
from sockhop.kernel.cgroups import AttachType, open_cgroup
from sockhop.kernel.links import detach
from sockhop.kernel.objects import BpfObject
from tests.clients.bpftool import bpftool
from tests.kernel.attaching import (
    CONNECT,
    NO_LINKS,
    Clients,
    Seen,
    attach_flagless,
    install,
    lighter,
    on_cgroup,
    running_agent,
)
from tests.sandbox import Sandbox, compact

pytestmark = pytest.mark.kernel

Attach = Callable[[Mapping[AttachType, int], int, Path, Owner], None]


class Lab(NamedTuple):
    """Services are installed and attached; clients may run."""

    sandbox: Sandbox
    clients: Clients
    lighter: Path
    cgroup: int

    def upgrade(self, times: int, attach: Attach = attach_hooks) -> list[int]:
        """Attach newly loaded programs, again and again; return the ids seen at connect4."""
        maps, links = map_directory(self.sandbox.pins), link_directory(self.sandbox.pins)
        owner, seen = Owner(maps), []
        for _ in range(times):
            with BpfObject(self.lighter, pins=maps) as loaded:
                programs = {hook: loaded.program(f"sockhop_{hook.hook}") for hook in CONNECT}
                attach(programs, self.cgroup, links, owner)
            found = attached_hooks(self.sandbox.pins, self.sandbox.cgroup)
            seen.append(found[AttachType.CONNECT4])
        return seen


@pytest.fixture
def lab(sandbox: Sandbox, tmp_path: Path) -> Iterator[Lab]:
    sandbox.pins.mkdir(mode=0o700)
    clients = Clients()
    with Balancer(sandbox.pins) as balancer, open_cgroup(sandbox.cgroup) as cgroup:
        install(balancer, clients.services())
        yield Lab(sandbox, clients, lighter(tmp_path / "lighter"), cgroup)
    remove_pins(sandbox.pins, sandbox.cgroup)


def show(seen: Seen) -> None:
    wrong = seen.failed + seen.untranslated
    print(
        f"{seen.connects:,} connects, {len(seen.failed)} failed, {len(seen.untranslated)} "
        f"untranslated: {wrong[:3]}"
    )


def test_200_upgrades_of_links_are_not_noticed(lab: Lab) -> None:
    lab.upgrade(1)
    with lab.clients:
        seen = lab.upgrade(200)
    show(lab.clients.seen)
    assert len(set(seen)) == 200
    pin = link_directory(lab.sandbox.pins) / "connect4"
    assert bpftool("link", "show", "pinned", str(pin))["prog_id"] == seen[-1]
    assert on_cgroup(lab.sandbox.cgroup)["connect4"] == (seen[-1],)
    assert lab.clients.seen.connects > 2000
    assert (lab.clients.seen.failed, lab.clients.seen.untranslated) == ([], [])


def detach_then_attach(
    programs: Mapping[AttachType, int], cgroup: int, links: Path, owner: Owner
) -> None:
    for hook in reversed(CONNECT):
        detach(links / hook.hook)
    attach_hooks(programs, cgroup, links, owner)


def test_detaching_before_attaching_is_noticed(lab: Lab) -> None:
    lab.upgrade(1)
    with lab.clients:
        seen = lab.upgrade(60, detach_then_attach)
    show(lab.clients.seen)
    assert len(set(seen)) == 60
    assert lab.clients.seen.failed


def test_upgrades_without_flags_are_not_noticed(lab: Lab) -> None:
    """An earlier version attached with PROG_ATTACH: a link gives EPERM."""
    with BpfObject(lab.lighter, pins=map_directory(lab.sandbox.pins)) as loaded:
        for hook in CONNECT:
            attach_flagless(loaded.program(f"sockhop_{hook.hook}"), lab.sandbox.cgroup, hook)
        first = on_cgroup(lab.sandbox.cgroup)
    with lab.clients:
        seen = lab.upgrade(50)
    show(lab.clients.seen)
    assert len({*seen, *first["connect4"]}) == 51
    assert not list(link_directory(lab.sandbox.pins).iterdir())
    shown = bpftool("cgroup", "show", str(lab.sandbox.cgroup))
    assert {(p["attach_type"], p.get("attach_flags", "")) for p in shown} == {
        ("cgroup_inet_sock_release", ""),
        ("cgroup_inet4_getpeername", ""),
        ("cgroup_inet4_connect", ""),
    }
    assert lab.clients.seen.connects > 500
    assert (lab.clients.seen.failed, lab.clients.seen.untranslated) == ([], [])


def test_agents_of_a_kernel_without_links(sandbox: Sandbox) -> None:
    """Each agent replaces what the one before it attached, and the last upgrade makes no link."""
    clients = Clients()
    services = {
        service.name: {
            "frontends": [f"{service.frontends[0].address}:80/tcp+udp"],
            "backends": [str(service.frontends[0].backends[0])],
        }
        for service in clients.services().services
    }
    manifest = sandbox.manifest(compact(**services))
    attached = []

    def look() -> None:
        status = json.loads(sandbox.sockhop("status", "-o", "json").stdout)
        assert status["balancing"]
        attached.append(on_cgroup(sandbox.cgroup))
        assert {hook: (number,) for hook, number in status["hooks"].items()} == attached[-1]

    with running_agent(sandbox, manifest, prefix=NO_LINKS) as agent, clients:
        look()
        assert agent.stop(signal.SIGKILL) == -signal.SIGKILL
        for prefix in (NO_LINKS, ()):
            with running_agent(sandbox, manifest, prefix=prefix):
                look()
    show(clients.seen)
    assert (clients.seen.failed, clients.seen.untranslated) == ([], [])
    assert not list((sandbox.pins / "links").iterdir())
    assert {len(hooks) for hooks in attached} == {len(HOOKS)}
    assert len({hooks["connect4"] for hooks in attached}) == 3
    # Wherever it is told that they are, it finds them.
    sandbox.sockhop("detach", "--cgroup", "/sys/fs/cgroup/cpu")
    assert on_cgroup(sandbox.cgroup) == {}
    assert not sandbox.pins.exists()
