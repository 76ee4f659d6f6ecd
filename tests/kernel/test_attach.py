"""One hook or several: attached anew, updated, replaced, put back, detached; and whose they are."""

import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

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
from sockhop.kernel._libbpf import lib
from sockhop.kernel.cgroups import Attached, AttachType, attached_programs, open_cgroup
from sockhop.kernel.links import Occupied, attach, read_link
from sockhop.kernel.maps import open_pinned
from sockhop.kernel.objects import program_info
from sockhop.kernel.syscall import KernelError
from tests.clients.bpftool import bpftool
from tests.kernel.attaching import (
    NO_LINKS,
    Stranger,
    attach_flagless,
    connects,
    on_cgroup,
    running_agent,
    tree_of,
)
from tests.sandbox import SOCKHOP, Sandbox, ServerThread, compact, wait_until

pytestmark = pytest.mark.kernel

VIP = "10.0.0.10"
CONNECT4, GETPEERNAME4 = AttachType.CONNECT4, AttachType.GETPEERNAME4
RELEASE, EGRESS = AttachType.SOCK_RELEASE, AttachType.EGRESS


@pytest.fixture
def manifest(sandbox: Sandbox) -> Iterator[Path]:
    with ServerThread("one", "127.0.0.1") as server:
        web = {"frontends": [f"{VIP}:80"], "backends": [server.endpoint]}
        yield sandbox.manifest(compact(web=web))


@pytest.fixture
def stranger(sandbox: Sandbox) -> Iterator[Stranger]:
    made = Stranger(sandbox.directory)
    yield made
    made.close()


@pytest.fixture
def child(sandbox: Sandbox) -> Iterator[Path]:
    """A cgroup below the sandbox's."""
    path = sandbox.cgroup / "child"
    path.mkdir()
    yield path
    if path.exists():
        path.rmdir()


@pytest.fixture
def balancer(sandbox: Sandbox) -> Iterator[Balancer]:
    """Loaded, not attached."""
    sandbox.pins.mkdir(mode=0o700)
    with Balancer(sandbox.pins) as made:
        yield made


def program(balancer: Balancer, hook: AttachType) -> int:
    return balancer._object.program(f"sockhop_{hook.hook}")


def attach_some(sandbox: Sandbox, programs: dict[AttachType, int], cgroup: Path) -> None:
    owner = Owner(map_directory(sandbox.pins))
    with open_cgroup(cgroup) as fd:
        attach_hooks(programs, fd, link_directory(sandbox.pins), owner)


# --- links ----------------------------------------------------------------------------------------


def test_a_fresh_attachment_outlives_the_agent(sandbox: Sandbox, manifest: Path) -> None:
    with sandbox.agent(manifest) as agent:
        agent.stop(signal.SIGKILL)
    links = {pin.name: bpftool("link", "show", "pinned", str(pin))
             for pin in link_directory(sandbox.pins).iterdir()}  # fmt: skip
    assert set(links) == {hook.hook for hook in HOOKS}
    assert {link["type"] for link in links.values()} == {"cgroup"}
    assert {link["cgroup_id"] for link in links.values()} == {sandbox.cgroup.stat().st_ino}
    assert on_cgroup(sandbox.cgroup) == {h: (link["prog_id"],) for h, link in links.items()}
    assert connects(VIP)


@pytest.mark.parametrize("is_held", [False, True], ids=["empty", "held by a socket"])
def test_a_link_whose_cgroup_is_gone_is_replaced(
    sandbox: Sandbox, balancer: Balancer, child: Path, is_held: bool
) -> None:
    with open_cgroup(child) as cgroup:
        balancer.attach(cgroup)
    pin = link_directory(sandbox.pins) / "connect4"
    old = bpftool("link", "show", "pinned", str(pin))["id"]
    (child / "cgroup.procs").write_text(str(os.getpid()))
    with socket.socket():
        (sandbox.cgroup / "cgroup.procs").write_text(str(os.getpid()))
        if is_held:
            child.rmdir()
            assert read_link(pin).cgroup  # type: ignore[union-attr]
            child.mkdir()
            check_replaced(balancer, pin, old, child)
    if not is_held:
        child.rmdir()
        wait_until(lambda: not read_link(pin).cgroup, "the link to be defunct")  # type: ignore[union-attr]
        assert attached_hooks(sandbox.pins) == {}
        child.mkdir()
        check_replaced(balancer, pin, old, child)


def check_replaced(balancer: Balancer, pin: Path, old: int, child: Path) -> None:
    with open_cgroup(child) as cgroup:
        balancer.attach(cgroup)
    link = bpftool("link", "show", "pinned", str(pin))
    assert link["id"] != old
    assert link["cgroup_id"] == child.stat().st_ino
    assert set(on_cgroup(child)) == {hook.hook for hook in HOOKS}


def test_links_stay_with_their_cgroup(
    sandbox: Sandbox, balancer: Balancer, child: Path, manifest: Path
) -> None:
    with open_cgroup(child) as cgroup:
        balancer.attach(cgroup)
    before = on_cgroup(child)
    result = sandbox.sockhop("agent", "-f", str(manifest), check=False)
    assert result.returncode == 3
    assert f"this link is attached to {child}, not to {sandbox.cgroup}" in result.stderr
    assert (on_cgroup(child), on_cgroup(sandbox.cgroup)) == (before, {})


def test_a_failed_update_leaves_all_as_it_was(sandbox: Sandbox, balancer: Balancer) -> None:
    """Also the hooks before the one that fails, be they updated or new."""
    attach_some(
        sandbox,
        {hook: program(balancer, hook) for hook in (GETPEERNAME4, CONNECT4)},
        sandbox.cgroup,
    )
    before = on_cgroup(sandbox.cgroup)
    with Balancer(sandbox.pins) as newer:
        programs = {
            RELEASE: program(newer, RELEASE),
            GETPEERNAME4: program(newer, GETPEERNAME4),
            CONNECT4: program(newer, RELEASE),  # which is of another type
        }
        pin = link_directory(sandbox.pins) / "connect4"
        with pytest.raises(KernelError, match=f"updating the link {pin}: Invalid argument"):
            attach_some(sandbox, programs, sandbox.cgroup)
    assert on_cgroup(sandbox.cgroup) == before
    assert {p.name for p in link_directory(sandbox.pins).iterdir()} == set(before)


def test_a_failed_update_without_flags_leaves_all_as_it_was(
    sandbox: Sandbox, balancer: Balancer
) -> None:
    for hook in (GETPEERNAME4, CONNECT4):
        attach_flagless(program(balancer, hook), sandbox.cgroup, hook)
    before = on_cgroup(sandbox.cgroup)
    with Balancer(sandbox.pins) as newer:
        programs = {
            RELEASE: program(newer, RELEASE),
            GETPEERNAME4: program(newer, GETPEERNAME4),
            CONNECT4: program(newer, AttachType.CONNECT6),
        }
        with pytest.raises(KernelError, match="attaching at connect4"):
            attach_some(sandbox, programs, sandbox.cgroup)
    assert on_cgroup(sandbox.cgroup) == before
    assert not list(link_directory(sandbox.pins).iterdir())
    remove_pins(sandbox.pins)
    assert on_cgroup(sandbox.cgroup) == {}


def test_a_failed_pin_leaves_nothing_attached(sandbox: Sandbox, balancer: Balancer) -> None:
    nowhere = link_directory(sandbox.pins) / "no-such-directory" / "connect4"
    with open_cgroup(sandbox.cgroup) as cgroup:
        with pytest.raises(KernelError, match=f"pinning the link {nowhere}: No such file"):
            attach(program(balancer, CONNECT4), cgroup, CONNECT4, nowhere, is_ours=lambda _: True)
        wait_until(lambda: not attached_programs(cgroup, CONNECT4).programs, "nothing attached")


# --- whose they are -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("is_above", "coexist"),
    [(False, ()), (False, ("--coexist",)), (True, ("--coexist",))],
    ids=["here", "here, coexist", "above, coexist"],
)
def test_a_strangers_flagless_program_stays(
    sandbox: Sandbox,
    manifest: Path,
    stranger: Stranger,
    child: Path,
    is_above: bool,
    coexist: tuple[str, ...],
) -> None:
    number = stranger.attach(sandbox.cgroup, CONNECT4)
    at = child if is_above else sandbox.cgroup
    arguments = ("agent", "-f", str(manifest), "--cgroup", str(at), *coexist)
    result = sandbox.sockhop(*arguments, check=False)
    assert result.returncode == 3
    tag = bpftool("prog", "show", "id", str(number))["tag"]
    assert f"program {number} 'other_connect4' (tag {tag})" in result.stderr
    assert str(sandbox.cgroup) in result.stderr
    assert on_cgroup(sandbox.cgroup) == {"connect4": (number,)}
    assert stranger.forbids()
    assert not sandbox.pins.exists()


def test_a_stranger_among_ours_changes_nothing(
    sandbox: Sandbox, manifest: Path, stranger: Stranger
) -> None:
    with running_agent(sandbox, manifest, prefix=NO_LINKS) as agent:
        agent.stop()
    with open_cgroup(sandbox.cgroup) as cgroup:
        lib.bpf_prog_detach2(-1, cgroup, CONNECT4)
    number = stranger.attach(sandbox.cgroup, CONNECT4)
    before = on_cgroup(sandbox.cgroup)
    manifest.write_text(compact())
    for arguments in ((), ("--coexist",)):
        result = sandbox.sockhop("agent", "-f", str(manifest), *arguments, check=False)
        assert result.returncode == 3
        assert f"program {number} 'other_connect4'" in result.stderr
    assert on_cgroup(sandbox.cgroup) == before
    assert bpftool("map", "dump", "pinned", str(map_directory(sandbox.pins) / "frontends"))
    sandbox.sockhop("detach")
    assert on_cgroup(sandbox.cgroup) == {"connect4": (number,)}


def test_without_links_a_stranger_that_lets_others_in_is_in_the_way(
    sandbox: Sandbox, manifest: Path, stranger: Stranger
) -> None:
    number = stranger.attach(sandbox.cgroup, CONNECT4, lib.BPF_F_ALLOW_MULTI)
    before = on_cgroup(sandbox.cgroup)
    command = (*NO_LINKS, str(SOCKHOP), "agent", "-f", str(manifest), "--coexist")
    result = sandbox.run(*command, check=False)
    assert result.returncode == 3
    assert f"is taken by program {number} 'other_connect4'" in result.stderr
    assert on_cgroup(sandbox.cgroup) == before
    assert not sandbox.pins.exists()


def test_the_owner_check_saves_a_stranger(
    sandbox: Sandbox, balancer: Balancer, stranger: Stranger, monkeypatch: pytest.MonkeyPatch
) -> None:
    number = stranger.attach(sandbox.cgroup, CONNECT4)
    with open_cgroup(sandbox.cgroup) as cgroup:
        with pytest.raises(Occupied, match=f"program {number} 'other_connect4'"):
            balancer.attach(cgroup)
        assert stranger.forbids()
        monkeypatch.setattr(Owner, "__call__", lambda *_: True)
        balancer.attach(cgroup)
    assert not stranger.forbids()  # so the check is what saves it


# --- detach ---------------------------------------------------------------------------------------


def test_detach_finds_ours_and_leaves_others(
    sandbox: Sandbox, manifest: Path, stranger: Stranger, child: Path
) -> None:
    """Ours is attached without links, others at the same cgroup and below."""
    below = stranger.attach(child, CONNECT4)
    here = stranger.attach(sandbox.cgroup, EGRESS, lib.BPF_F_ALLOW_MULTI)
    with running_agent(sandbox, manifest, "--coexist", prefix=NO_LINKS) as agent:
        agent.stop()
    assert connects(VIP)
    assert "detached" in sandbox.sockhop("detach").stdout
    assert not connects(VIP)
    assert on_cgroup(sandbox.cgroup, (*HOOKS, EGRESS)) == {"egress": (here,)}
    assert on_cgroup(child) == {"connect4": (below,)}
    assert not sandbox.pins.exists()
    assert "nothing of ours" in sandbox.sockhop("detach").stdout


def test_detaching_by_hook_alone_is_noticed(
    sandbox: Sandbox, balancer: Balancer, stranger: Stranger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The owner check off: what the reference does."""
    attach_some(sandbox, {RELEASE: program(balancer, RELEASE)}, sandbox.cgroup)
    number = stranger.attach(sandbox.cgroup, CONNECT4)
    monkeypatch.setattr(Owner, "__call__", lambda *_: True)
    with monkeypatch.context() as narrowed:
        # All is ours to it, so keep it to this cgroup.
        narrowed.setattr("sockhop.datapath.attachment.cgroup_root", lambda: sandbox.cgroup)
        remove_pins(sandbox.pins)
    assert number not in on_cgroup(sandbox.cgroup).get("connect4", ())


def test_a_pin_that_cannot_be_removed_is_an_error(sandbox: Sandbox, manifest: Path) -> None:
    with sandbox.agent(manifest) as agent:
        agent.stop()
    before = on_cgroup(sandbox.cgroup), tree_of(sandbox.pins)
    read_only = (
        'mount --bind /sys/fs/bpf /sys/fs/bpf && mount -o remount,bind,ro /sys/fs/bpf && exec "$@"'
    )
    result = sandbox.run("unshare", "-m", "sh", "-c", read_only, "sh",
                         str(SOCKHOP), "detach", check=False)  # fmt: skip
    assert result.returncode == 3
    assert f"{sandbox.pins}/links/connect6: this pin cannot be removed: Read-only" in result.stderr
    assert (on_cgroup(sandbox.cgroup), tree_of(sandbox.pins)) == before
    assert connects(VIP)


def test_a_link_of_ours_that_is_pinned_elsewhere_is_named(
    sandbox: Sandbox, balancer: Balancer
) -> None:
    attach_some(sandbox, {CONNECT4: program(balancer, CONNECT4)}, sandbox.cgroup)
    pin = link_directory(sandbox.pins) / "connect4"
    held = open_pinned(pin)
    pin.unlink()
    (number,) = on_cgroup(sandbox.cgroup)["connect4"]
    with pytest.raises(KernelError, match=f"detaching program {number} from connect4.*\n.*a link"):
        remove_pins(sandbox.pins)
    os.close(held)
    assert map_directory(sandbox.pins).exists()


def test_a_type_unknown_to_the_kernel_and_cgroup_v1_have_no_programs(sandbox: Sandbox) -> None:
    unknown = 9999
    with open_cgroup(sandbox.cgroup) as cgroup:
        assert attached_programs(cgroup, unknown) == Attached()  # type: ignore[arg-type]
    v1 = os.open("/sys/fs/cgroup/cpu", os.O_RDONLY)
    try:
        assert attached_programs(v1, CONNECT4) == Attached()
    finally:
        os.close(v1)


# --- where it cannot be ---------------------------------------------------------------------------

UNMOUNTED = ("unshare", "-m", "sh", "-c", 'umount -l /sys/fs/bpf && exec "$@"', "sh")
POWERLESS = ("setpriv", "--bounding-set=-all", "--inh-caps=-all")
NOBODY = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")


# Under which command, with which arguments, what it should complain of.
IMPOSSIBLE: list[tuple[tuple[str, ...], tuple[str, ...], str]] = [
    ((), ("--cgroup", "/sys/fs/cgroup/cpu"), "/sys/fs/cgroup/cpu: this is a cgroup v1"),
    ((), ("--bpffs", "/tmp/sockhop-test"), "pins need a BPF filesystem"),
    (UNMOUNTED, (), "pins need a BPF filesystem"),
    (POWERLESS, (), "EPERM"),
    (NOBODY, (), "run as root"),
]


@pytest.mark.parametrize("is_installed", [False, True], ids=["first", "installed"])
def test_nothing_changes_where_it_cannot_be(
    sandbox: Sandbox, manifest: Path, is_installed: bool
) -> None:
    if is_installed:
        with sandbox.agent(manifest) as agent:
            agent.stop()
    sandbox.directory.chmod(0o755)
    before = on_cgroup(sandbox.cgroup), tree_of(sandbox.pins)
    for prefix, arguments, complaint in IMPOSSIBLE:
        command = (*prefix, str(SOCKHOP), "agent", "-f", str(manifest), *arguments)
        result = sandbox.run(*command, check=False)
        assert result.returncode == 3, result.stderr
        assert complaint in result.stderr
        assert "Traceback" not in result.stderr
        assert (on_cgroup(sandbox.cgroup), tree_of(sandbox.pins)) == before
        assert sandbox.pins.exists() == is_installed
        assert connects(VIP) == is_installed


def test_a_second_agent_changes_nothing(sandbox: Sandbox, manifest: Path) -> None:
    with sandbox.agent(manifest):
        before = on_cgroup(sandbox.cgroup), tree_of(sandbox.pins)
        result = sandbox.sockhop("agent", "-f", str(manifest), check=False)
        assert result.returncode == 3
        assert "another sockhop process is working here" in result.stderr
        assert (on_cgroup(sandbox.cgroup), tree_of(sandbox.pins)) == before


def test_pins_that_another_process_removes(sandbox: Sandbox, balancer: Balancer) -> None:
    """What is still there says whose a program is."""
    maps = map_directory(sandbox.pins)
    own = program_info(program(balancer, CONNECT4)).id
    (maps / "a").symlink_to("nowhere")
    try:
        assert Owner(maps)(own)
    finally:
        (maps / "a").unlink()
