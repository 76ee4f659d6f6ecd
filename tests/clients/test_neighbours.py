"""Programs of others on our cgroup run beside ours, and are there when ours are gone."""

import errno
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.clients import bpftool
from tests.clients.dialers import Unserved, ask_blocking
from tests.sandbox import Sandbox, ServerThread, compact, wait_until

pytestmark = pytest.mark.kernel

FORBIDDEN = 6666
# struct bpf_sock_addr of linux/bpf.h up to the port.
PROGRAM = f"""
struct bpf_sock_addr {{ unsigned family, ip4, ip6[4], port; }};
__attribute__((section("cgroup/connect4"), used))
int other_connect4(struct bpf_sock_addr *ctx)
{{
	return ctx->port != (unsigned)__builtin_bswap16({FORBIDDEN});
}}
__attribute__((section("license"), used)) char terms[] = "GPL";
"""
VIP = "10.96.0.10"
TCP = socket.SOCK_STREAM


def attach_other(sandbox: Sandbox, pins: Path) -> int:
    """Attach another tool's program, which forbids one port; return its id."""
    source = sandbox.directory / "other.bpf.c"
    source.write_text(PROGRAM)
    made = source.with_suffix(".o")
    subprocess.run(["clang", "-O2", "-target", "bpf", "-c", source, "-o", made], check=True)
    pin = str(pins / "connect4")
    bpftool.bpftool("prog", "load", str(made), pin, "type", "cgroup/connect4")
    bpftool.bpftool("cgroup", "attach", str(sandbox.cgroup), "connect4", "pinned", pin, "multi")
    return int(bpftool.bpftool("prog", "show", "pinned", pin)["id"])


@pytest.fixture
def other(sandbox: Sandbox) -> Iterator[int]:
    """The id of another tool's program on the cgroup."""
    pins = Path(f"/sys/fs/bpf/{sandbox.name}-other")
    pins.mkdir(mode=0o700)
    try:
        yield attach_other(sandbox, pins)
    finally:
        shutil.rmtree(pins)


@pytest.fixture
def server() -> Iterator[ServerThread]:
    with ServerThread("one", "127.0.0.1") as made:
        yield made


def connect_forbidden() -> int:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", FORBIDDEN))


def only_other_in_tree(sandbox: Sandbox, other: int) -> bool:
    """Whether `bpftool cgroup tree` shows that program on our cgroup, and nothing else."""
    tree = bpftool.bpftool("cgroup", "tree")
    shown = [p["id"] for group in tree if group["cgroup"] == str(sandbox.cgroup)
             for p in group["programs"]]  # fmt: skip
    return shown == [other]


def test_others_stay_and_nothing_of_ours_does(
    sandbox: Sandbox, other: int, server: ServerThread
) -> None:
    assert connect_forbidden() == errno.EPERM
    web = {"frontends": [f"{VIP}:80"], "backends": [server.endpoint]}
    with sandbox.agent(sandbox.manifest(compact(web=web)), "--coexist") as agent:
        assert ask_blocking(VIP, 80, TCP) == "one"
        assert connect_forbidden() == errno.EPERM
        on_cgroup = bpftool.attached(sandbox.cgroup)
        assert {program.attach_type for program in on_cgroup if program.id != other} >= {
            "cgroup_inet4_connect",
            "cgroup_inet6_connect",
            "cgroup_inet4_getpeername",
            "cgroup_inet6_getpeername",
            "cgroup_inet_sock_release",
        }
        maps = bpftool.map_ids(sandbox.pins)
        ours = bpftool.programs_with(maps)
        attached = {program.id for program in on_cgroup} - {other}
        # The agent also holds iterators, which look at sockets and end them.
        assert ours > attached
        shown = [link for link in bpftool.bpftool("link", "show") if link["prog_id"] in ours]
        assert len([link for link in shown if link["prog_id"] in attached]) == len(attached)
        assert {link["type"] for link in shown if link["prog_id"] not in attached} <= {"iter"}
        links = {link["id"] for link in shown}

        agent.stop(signal.SIGKILL)
        assert ask_blocking(VIP, 80, TCP) == "one"
        assert bpftool.attached(sandbox.cgroup) == on_cgroup

    sandbox.sockhop("detach")
    with pytest.raises(Unserved):
        ask_blocking(VIP, 80, TCP)
    assert only_other_in_tree(sandbox, other)
    assert not sandbox.pins.exists()
    # The kernel frees what nobody holds a moment later.
    for kind, ids in (("prog", ours), ("map", maps), ("link", links)):
        wait_until(
            lambda kind=kind, ids=ids: not ids & {e["id"] for e in bpftool.bpftool(kind, "show")},  # type: ignore[misc]
            f"no {kind} of ours",
        )
    assert connect_forbidden() == errno.EPERM


def test_a_restart_replaces_only_our_programs(
    sandbox: Sandbox, other: int, server: ServerThread
) -> None:
    web = {"frontends": [f"{VIP}:80"], "backends": [server.endpoint]}
    manifest = sandbox.manifest(compact(web=web))
    with sandbox.agent(manifest, "--coexist") as agent:
        first = bpftool.attached(sandbox.cgroup)
        agent.stop(signal.SIGKILL)
    with sandbox.agent(manifest, "--coexist"):
        second = bpftool.attached(sandbox.cgroup)
        assert ask_blocking(VIP, 80, TCP) == "one"
    assert [p.id for p in first & second] == [other]
    assert {(p.attach_type, p.name) for p in first} == {(p.attach_type, p.name) for p in second}
    assert connect_forbidden() == errno.EPERM
    maps = bpftool.map_ids(sandbox.pins)
    wait_until(
        lambda: bpftool.programs_with(maps) == {p.id for p in second} - {other},
        "only the programs of the second agent",
    )


def test_detach_on_exit(sandbox: Sandbox, other: int, server: ServerThread) -> None:
    web = {"frontends": [f"{VIP}:80"], "backends": [server.endpoint]}
    manifest = sandbox.manifest(compact(web=web))
    with sandbox.agent(manifest, "--coexist", "--detach-on-exit"):
        assert ask_blocking(VIP, 80, TCP) == "one"
    assert only_other_in_tree(sandbox, other)
    assert not sandbox.pins.exists()
