"""Mounts are found wherever they are."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sockhop.errors import InputError, SystemLackError
from sockhop.kernel import cgroups
from sockhop.kernel import mounts as mounts_module
from sockhop.kernel.bpffs import Locked, lock_directory, require_bpffs
from sockhop.kernel.cgroups import cgroup_root, open_cgroup
from sockhop.kernel.mounts import filesystem_type, mounts
from tests.sandbox import Sandbox

MOUNTINFO = """\
23 1 259:0 / / rw,relatime - ext4 /dev/root rw
31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw,mode=755
37 31 0:34 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,name=systemd
38 31 0:35 / /mnt/my\\040groups rw,nosuid shared:4 master:1 - cgroup2 cgroup2 rw
39 23 0:36 / /sys/fs/bpf rw - tmpfs none rw
40 39 0:37 / /sys/fs/bpf rw - bpf none rw
"""


@pytest.fixture
def other_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "mountinfo"
    path.write_text(MOUNTINFO)
    monkeypatch.setattr(mounts_module, "_MOUNTINFO", path)


@pytest.mark.unit
@pytest.mark.usefixtures("other_machine")
def test_mountinfo_is_read_as_the_kernel_writes_it() -> None:
    assert [(str(m.point), m.type) for m in mounts()][3] == ("/mnt/my groups", "cgroup2")
    assert cgroup_root() == Path("/mnt/my groups")
    assert filesystem_type(Path("/mnt/my groups/a/b")) == "cgroup2"
    assert filesystem_type(Path("/sys/fs/bpf/sockhop")) == "bpf"  # the later mount hides the first
    assert filesystem_type(Path("/sys/fs/cgroup/systemd/x")) == "cgroup"
    assert filesystem_type(Path("/sys/fs/cgroups")) == "ext4"


@pytest.mark.kernel
def test_the_name_of_a_mount_is_any_bytes(tmp_path: Path) -> None:
    """Whoever may mount something chooses it: neither UTF-8, nor without what ends lines."""
    odd = os.fsencode(tmp_path) + b"/M\xfcsic\x0c\xc2\x85"
    mount = 'mkdir "$0" && mount -t tmpfs none "$0" && exec "$@"'
    script = (
        "import os; from sockhop.kernel.cgroups import cgroup_root; cgroup_root();"
        "from sockhop.kernel.mounts import mounts;"
        "print(*(os.fsencode(each.point).hex() for each in mounts(of_type='tmpfs')))"
    )
    told = subprocess.run(
        ["unshare", "-m", "sh", "-c", mount, odd, sys.executable, "-c", script],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    assert odd.hex() in told.stdout.split()


@pytest.mark.unit
@pytest.mark.usefixtures("other_machine")
def test_cgroup_v1_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="there is no such cgroup"), open_cgroup(tmp_path / "no"):
        pass
    monkeypatch.setattr(cgroups, "filesystem_type", lambda _: "cgroup")
    with pytest.raises(SystemLackError, match="this is a cgroup v1"), open_cgroup(tmp_path):
        pass


@pytest.mark.unit
def test_a_directory_that_is_no_bpffs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemLackError, match="pins need a BPF filesystem.*\n.*mount -t bpf"):
        require_bpffs(tmp_path / "sockhop")


@pytest.mark.kernel
def test_one_process_writes_to_a_directory(sandbox: Sandbox) -> None:
    with lock_directory(sandbox.pins):
        with pytest.raises(Locked, match="another sockhop process"), lock_directory(sandbox.pins):
            pass
        assert sandbox.pins.stat().st_mode & 0o777 == 0o700
        result = sandbox.sockhop("detach", check=False)
        assert result.returncode == 3
        assert "another sockhop process is working here" in result.stderr
