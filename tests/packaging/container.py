"""A systemd of a test's own, in namespaces and a cgroup of its own, with no way out.

It is the first process of its pid namespace, has only the units that it is given, a new network
namespace, no bpffs yet, the cgroup as the root of its hierarchy, and the host's files read-only.
"""

import contextlib
import itertools
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import sockhop
from sockhop.kernel.cgroups import cgroup_root
from tests.sandbox import wait_until

__all__ = ["SYSTEMD", "Container"]

SYSTEMD = Path("/lib/systemd/systemd")
_TARGETS = ("basic", "multi-user", "paths", "shutdown", "sockets", "sysinit", "timers", "umount")
_ETC = ("group", "hosts", "ld.so.cache", "localtime", "machine-id", "nsswitch.conf", "passwd")
_SITE = Path(next(path for path in sys.path if path.endswith("site-packages")))
_numbers = itertools.count()

# $1: a directory with the files below etc/, opt/ and units/. Later mounts hide earlier ones.
_BOOT = r"""
set -eu
mount --make-rprivate /
umount -R -l /sys
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t cgroup2 none /sys/fs/cgroup
mount --bind /proc/sys /proc/sys
mount -o remount,bind,ro /proc/sys

mount -t tmpfs -o mode=755 tmpfs /mnt
cp -r "$1"/* /mnt
mkdir /mnt/dev /mnt/run /mnt/opt/python /mnt/opt/site /mnt/opt/source
mount --bind "$PYTHON_BASE" /mnt/opt/python
mount --bind "$PYTHON_SITE" /mnt/opt/site
mount --bind "$PYTHON_SOURCE" /mnt/opt/source
mount -t tmpfs -o mode=755 tmpfs /mnt/dev
cd /mnt/dev
for node in full null random tty urandom zero; do touch $node; mount --bind /dev/$node $node; done
mkdir mqueue pts shm
mount -t mqueue mqueue mqueue
mount -t devpts -o newinstance,ptmxmode=666 devpts pts
mount -t tmpfs tmpfs shm
ln -s pts/ptmx ptmx; ln -s /proc/self/fd fd
ln -s fd/0 stdin; ln -s fd/1 stdout; ln -s fd/2 stderr
cd /
mount -t tmpfs -o mode=755 tmpfs /mnt/run
mkdir -p /mnt/run/systemd /mnt/run/none
mv /mnt/units /mnt/run/systemd/system
for directory in etc opt dev run; do mount --rbind /mnt/$directory /$directory; done
for directory in tmp var/tmp; do mount -t tmpfs -o mode=1777 tmpfs /$directory; done
mount -o remount,bind,ro /
exec env -i container=sockhop-test PATH=/usr/sbin:/usr/bin:/sbin:/bin \
    SYSTEMD_UNIT_PATH=/run/systemd/system \
    SYSTEMD_GENERATOR_PATH=/run/none SYSTEMD_ENVIRONMENT_GENERATOR_PATH=/run/none \
    /lib/systemd/systemd --system --unit=multi-user.target --log-target=null --show-status=no
"""

_JOIN = 'mkdir -p /sys/fs/cgroup/clients && echo $$ > /sys/fs/cgroup/clients/cgroup.procs && "$@"'

_SOCKHOP = """\
#!/opt/python/bin/python3
import sys
sys.path[:0] = ["/opt/source", "/opt/site"]
from sockhop.cli.main import main
main()
"""


class Container:
    """See the module. Use as a context manager."""

    def __init__(self, directory: Path, unit: Path, manifest: str) -> None:
        """*directory* is an empty one; *manifest* becomes /etc/sockhop/services.yaml."""
        self._directory = directory
        self._unit = unit
        self._manifest = manifest
        self._cgroup = cgroup_root() / f"sockhop-test-{os.getpid()}-systemd-{next(_numbers)}"
        self._stack = contextlib.ExitStack()
        self._first = 0

    def run(self, *command: str, check: bool = True) -> Any:
        """Run a command beside systemd, in a cgroup of its own, to its end."""
        enter = ("nsenter", f"--target={self._first}", "-m", "-p", "-u", "-i", "-n", "-C")
        done = subprocess.run(
            [*enter, "sh", "-c", _JOIN, "sh", *command],
            check=False,
            capture_output=True,
            text=True,
            timeout=60,
        )
        if check and done.returncode:
            pytest.fail(f"{command}: exit {done.returncode}\n{done.stdout}{done.stderr}")
        return done

    def write(self, path: str, text: str) -> None:
        self.run("sh", "-c", 'printf %s "$0" > "$1"', text, path)

    def systemctl(self, *arguments: str, check: bool = True) -> Any:
        return self.run("systemctl", "--no-pager", *arguments, check=check)

    def show(self, field: str) -> str:
        return str(self.systemctl("show", "--value", "-p", field, "sockhop").stdout).strip()

    def log(self) -> str:
        """What the service wrote."""
        return str(self.run("cat", "/run/sockhop.log", check=False).stdout)

    @contextlib.contextmanager
    def drop_in(self, text: str) -> Iterator[None]:
        """Add settings of [Service] to the unit while the body runs."""
        path = "/run/systemd/system/sockhop.service.d/test.conf"
        self.write(path, f"[Service]\n{text}\n")
        self.systemctl("daemon-reload")
        try:
            yield
        finally:
            self.run("rm", path)
            self.systemctl("daemon-reload")

    def __enter__(self) -> "Container":
        self._write_files()
        try:
            self._boot()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _write_files(self) -> None:
        units, etc, binaries = (
            self._directory / part for part in ("units", "etc", "opt/sockhop/bin")
        )
        for directory in (units / "sockhop.service.d", etc / "sockhop", binaries):
            directory.mkdir(parents=True)
        shutil.copy(self._unit, units / "sockhop.service")
        # There is no journal here; and a Python below /root, which the unit hides, has moved.
        (units / "sockhop.service.d" / "container.conf").write_text(
            "[Service]\nStandardOutput=append:/run/sockhop.log\nStandardError=inherit\n"
            "Environment=LD_LIBRARY_PATH=/opt/python/lib\n"
        )
        for target in _TARGETS:
            (units / f"{target}.target").write_text("[Unit]\nDefaultDependencies=no\n")
        for name in _ETC:
            if (Path("/etc") / name).exists():
                shutil.copy(Path("/etc") / name, etc / name)
        (etc / "sockhop" / "services.yaml").write_text(self._manifest)
        (binaries / "sockhop").write_text(_SOCKHOP)
        (binaries / "sockhop").chmod(0o755)

    def _boot(self) -> None:
        self._cgroup.mkdir()
        self._stack.callback(self._remove_cgroup)
        join = f"echo $$ > {self._cgroup}/cgroup.procs && exec unshare --kill-child=KILL"
        namespaces = "--cgroup --mount --pid --uts --ipc --net --fork"
        process = subprocess.Popen(
            ["sh", "-c", f'{join} {namespaces} sh -c "$0" sh "$1"', _BOOT, str(self._directory)],
            stdin=subprocess.DEVNULL,
            env=os.environ
            | {
                "PYTHON_BASE": sys.base_prefix,
                "PYTHON_SITE": str(_SITE),
                "PYTHON_SOURCE": str(Path(sockhop.__file__).parent.parent),
            },
        )
        self._stack.callback(process.wait, 10)
        self._stack.callback(process.kill)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")

        def running() -> bool:
            if process.poll() is not None:
                pytest.fail("the container's systemd did not start; its complaint is above")
            self._first = int(children.read_text() or 0)
            state = self.systemctl("is-system-running", check=False) if self._first else None
            return state is not None and state.stdout.strip() == "running"

        wait_until(running, "a running systemd", 20)

    def _remove_cgroup(self) -> None:
        def gone() -> bool:
            for directory, _, _ in os.walk(self._cgroup, topdown=False):
                with contextlib.suppress(OSError):
                    Path(directory).rmdir()
            return not self._cgroup.exists()

        wait_until(gone, "the container's cgroup is gone")
