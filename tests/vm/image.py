"""The file system of a virtual machine: this very Python, sockhop, its tests and a few programs.

It is an initramfs: archives in the `newc` format of cpio, one after the other
(Documentation/driver-api/early-userspace/buffer-format.rst).
"""

import importlib.metadata
import os
import re
import shutil
import stat
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

from tests.vm.kernels import Kernel, unpacked

__all__ = ["build_image"]

_REPO = Path(__file__).parents[2]
_PROGRAMS = ("ip", "ss", "bpftool", "nsenter", "setpriv", "mount", "umount")
_TEST_PACKAGES = ("pytest", "pytest-timeout", "hypothesis", "dnspython", "aioquic")
# Parts of the standard library that no test needs, and that are large.
_LEFT_OUT = ("test", "idlelib", "tkinter", "ensurepip", "lib2to3", "turtledemo", "config-3.*")

_INIT = """#!/bin/busybox sh
export PATH={path}:/bin:/sbin:/usr/bin:/usr/sbin HOME=/root LC_ALL=C.UTF-8 COLUMNS=400 SOCKHOP_VM=1
busybox mount -t proc proc /proc
busybox mount -t sysfs sysfs /sys
busybox mount -t devtmpfs dev /dev
busybox mkdir -p /dev/shm /sys/fs/cgroup
busybox mount -t cgroup2 cgroup2 /sys/fs/cgroup
busybox mount -t bpf bpf /sys/fs/bpf
for module in /modules/*.ko; do busybox insmod "$module" || echo "insmod $module failed"; done
ip link set lo up
cd {repo}
sockhop features -o json >/features || true
echo "FEATURES $(busybox tr -d '\n' </features)"
echo BEGIN
{python} -m pytest -p no:cacheprovider -v --color=no --tb=short -m '' {arguments}
echo "END $?"
busybox poweroff -f
"""


class _Archive:
    """A cpio archive; each path once, with the directories that lead to it."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._seen: set[str] = set()

    def add(self, path: str, data: bytes, mode: int, mtime: int = 0) -> None:
        path = path.strip("/")
        if path in self._seen:
            return
        self._seen.add(path)
        parent = path.rpartition("/")[0]
        if parent:
            self.add(parent, b"", stat.S_IFDIR | 0o755)
        self._append(path, data, mode, mtime)

    def add_path(self, source: Path, target: Path | None = None) -> None:
        """Add a file or a link as it is, and what a link leads to."""
        at = str(target or source)
        if source.is_symlink():
            # The link of a directory on the way (/lib to /usr/lib) is followed, not kept.
            self.add_path(source.resolve(), Path(at))
            return
        status = source.stat()
        self.add(at, source.read_bytes(), status.st_mode, int(status.st_mtime))

    def _append(self, path: str, data: bytes, mode: int, mtime: int) -> None:
        name = path.encode() + b"\0"
        fields = (len(self._seen), mode, 0, 0, 1, mtime, len(data), 0, 0, 0, 0, len(name), 0)
        head = b"070701" + b"".join(b"%08x" % field for field in fields) + name
        self._parts += [head, bytes(-len(head) % 4), data, bytes(-len(data) % 4)]

    def write(self, path: Path) -> None:
        self._append("TRAILER!!!", b"", 0, 0)
        path.write_bytes(b"".join(self._parts))


def build_image(path: Path, kernel: Kernel, arguments: str) -> None:
    """Write the initramfs in which pytest runs with *arguments*, then the machine ends."""
    archive = _Archive()
    for name in ("proc", "sys", "dev", "tmp", "run", "root", "modules", "etc", "var/empty"):
        archive.add(name, b"", stat.S_IFDIR | 0o755)
    busybox = shutil.which("busybox")
    assert busybox, "busybox-static is not installed"
    archive.add_path(Path(busybox), Path("/bin/busybox"))
    for name in ("sh", "sleep", "cat", "true", "env"):
        archive.add(f"bin/{name}", b"/bin/busybox", stat.S_IFLNK | 0o777)
    files = list(_files())
    for file in files:
        archive.add_path(file)
    programs = [Path(found) for name in _PROGRAMS if (found := shutil.which(name))]
    for file in (*programs, *_libraries([*files, *programs])):
        archive.add_path(file)
    for number, module in enumerate(kernel.modules):
        name = module.name.split(".")[0]
        archive.add(f"modules/{number:02}-{name}.ko", unpacked(module), stat.S_IFREG | 0o644)
    archive.add("etc/passwd", b"root:x:0:0::/root:/bin/sh\n", stat.S_IFREG | 0o644)
    script = _INIT.format(
        path=Path(sys.executable).parent, repo=_REPO, python=sys.executable, arguments=arguments
    )
    archive.add("init", script.encode(), stat.S_IFREG | 0o755)
    archive.write(path)


def _files() -> Iterator[Path]:
    """Yield Python, its library, the packages that sockhop and its tests need, and the tree."""
    venv = Path(sys.prefix)
    yield from (Path(sys.executable), venv / "pyvenv.cfg", venv / "bin" / "sockhop")
    yield from (path for path in venv.glob("lib/python3*/site-packages/*sockhop*.pth"))
    yield Path(sys.executable).resolve()
    library = Path(sysconfig.get_path("stdlib"))
    left_out = {path for pattern in _LEFT_OUT for path in library.glob(pattern)}
    left_out.add(library / "site-packages")
    yield from _tree(library, left_out)
    for name in sorted(_closure(("sockhop", *_TEST_PACKAGES))):
        for file in importlib.metadata.files(name) or []:
            found = Path(str(file.locate()))
            if found.is_file() and found.suffix != ".pth":
                yield found
    for part in ("src", "tests", "bpf"):
        yield from _tree(_REPO / part, set())
    yield _REPO / "pyproject.toml"


def _tree(top: Path, left_out: set[Path]) -> Iterator[Path]:
    for directory, names, files in os.walk(top):
        here = Path(directory)
        names[:] = [name for name in names if here / name not in left_out]
        yield from (here / name for name in files if (here / name).is_file())


def _closure(names: Iterable[str]) -> set[str]:
    """Return the distributions that *names* need, with their own names normalised (PEP 503)."""
    found: set[str] = set()
    pending = list(names)
    while pending:
        name = re.sub(r"[-_.]+", "-", pending.pop()).lower()
        if name in found:
            continue
        try:
            needs = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue  # for another platform or Python
        found.add(name)
        pending += [
            re.split(r"[^A-Za-z0-9._-]", need, maxsplit=1)[0]
            for need in needs
            if "extra ==" not in need
        ]
    return found


def _libraries(files: Iterable[Path]) -> set[Path]:
    """Return the shared libraries that programs and extensions among *files* load."""
    binaries = [str(file) for file in files if file.read_bytes()[:4] == b"\x7fELF"]
    listed = subprocess.run(
        ["ldd", *binaries], capture_output=True, text=True, timeout=120, check=False
    ).stdout
    return {Path(found) for found in re.findall(r"(/\S+)\s+\(0x", listed)}
