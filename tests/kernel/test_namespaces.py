"""Network namespaces are found by whatever holds them, and never entered under a wrong name."""

import contextlib
import os
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from sockhop.kernel import netns
from sockhop.kernel.cgroups import AttachType, attached_programs, open_cgroup, own_cgroup
from sockhop.kernel.namespaces import (
    Namespace,
    NamespaceGone,
    Namespaces,
    entered,
    mounted_names,
)
from tests.sandbox import Sandbox, wait_until

pytestmark = pytest.mark.kernel


@contextlib.contextmanager
def mounted(name: str) -> Iterator[Path]:
    subprocess.run(["ip", "netns", "add", name], check=True)
    try:
        yield Path("/run/netns") / name
    finally:
        subprocess.run(["ip", "netns", "del", name], check=False)


@pytest.fixture
def name() -> str:
    return f"sockhop-test-{os.getpid()}-found"


def inodes() -> set[int]:
    return {each.inode for each in Namespaces().all()}


def test_one_that_is_mounted(name: str) -> None:
    with mounted(name) as path:
        number = netns.inode(path)
        (found,) = Namespaces().by_inode([number])
        with entered(found):
            assert netns.inode() == number
            cookie = netns.current_cookie()
        assert Namespaces().by_cookie([cookie]) == [found]
        assert mounted_names()[number] == name
    assert number not in inodes()


def test_who_only_visits_one_does_not_hold_it(name: str) -> None:
    """Whoever looks at all namespaces, as we do, is in each of them for a moment."""
    with mounted(name) as path:
        number = netns.inode(path)
        with subprocess.Popen(["nsenter", f"--net={path}", "sleep", "60"]) as visitor:
            inside = Path(f"/proc/{visitor.pid}/ns/net")
            wait_until(lambda: netns.inode(inside) == number, "the visitor")
            (found,) = (each for each in Namespaces().all() if each.inode == number)
            visitor.kill()
        with entered(found):
            assert netns.inode() == number


def test_one_that_is_mounted_where_only_another_process_sees_it(name: str, tmp_path: Path) -> None:
    point = tmp_path / "pod"
    point.touch()
    with mounted(name) as path:
        number = netns.inode(path)
        script = f"mount --bind {path} {point} && echo ready && read line"
        with subprocess.Popen(
            ["unshare", "--mount", "sh", "-c", script],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        ) as process:
            assert process.stdout
            assert process.stdout.readline() == b"ready\n"
            subprocess.run(["ip", "netns", "del", name], check=True)
            (found,) = Namespaces().by_inode([number])
            with entered(found):
                assert netns.inode() == number
            assert mounted_names()[number] == str(point)
            assert process.stdin
            process.stdin.close()
    wait_until(lambda: number not in inodes(), "the namespace goes")


def test_one_that_only_a_thread_is_in(name: str) -> None:
    inside, done, number = threading.Event(), threading.Event(), []

    def stay() -> None:
        with mounted(name) as path, netns.entered(path):
            subprocess.run(["ip", "netns", "del", name], check=True)
            number.append(netns.inode())
            inside.set()
            done.wait(20)

    thread = threading.Thread(target=stay)
    thread.start()
    assert inside.wait(20)
    try:
        (found,) = Namespaces().by_inode(number)
        assert "/task/" in str(found.path)
    finally:
        done.set()
        thread.join()


def test_one_that_only_a_descriptor_holds(name: str) -> None:
    with mounted(name) as path:
        number = netns.inode(path)
        held = os.open(path, os.O_RDONLY)
    try:
        known = Namespaces()
        (found,) = known.by_inode([number])
        with entered(found):
            assert netns.inode() == number
    finally:
        os.close(held)
    with pytest.raises(NamespaceGone), entered(found):
        pass
    assert known.by_inode([number]) == []


def test_a_path_that_leads_elsewhere_by_now(name: str) -> None:
    own = netns.inode()
    with mounted(name) as path:
        (found,) = Namespaces().by_inode([netns.inode(path)])
        wrong = Namespace(found.inode, found.cookie + 1, path)
        with pytest.raises(NamespaceGone), entered(wrong):
            pass
        assert netns.inode() == own


def test_each_namespace_is_found_once() -> None:
    found = Namespaces().all()
    assert len({each.inode for each in found}) == len(found)
    assert len({each.cookie for each in found}) == len(found)
    assert netns.inode() in {each.inode for each in found}


def test_the_cookie_before_linux_5_14(
    sandbox: Sandbox, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The program at sock_create tells the cookie that the socket option tells."""
    with mounted(name) as path:
        with netns.entered(path):
            there, own = netns.current_cookie(), socket.socket()
        with own:
            here = netns.current_cookie()
            assert netns.socket_netns_cookie(own) == there != here
            monkeypatch.setattr(netns, "cookie_by_option", lambda _: None)
            assert netns.current_cookie() == here
            assert netns.socket_netns_cookie(own) == there
            with netns.entered(path):
                assert netns.current_cookie() == there
    with open_cgroup(own_cgroup()) as cgroup:
        assert not attached_programs(cgroup, AttachType.SOCK_CREATE).programs
