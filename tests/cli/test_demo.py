"""`sockhop demo`: shows what it promises, says so when it fails, and leaves nothing behind."""

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from sockhop.kernel.cgroups import cgroup_root
from tests.sandbox import SOCKHOP, wait_until

pytestmark = pytest.mark.kernel

BPFFS = Path("/sys/fs/bpf")
TOOLS = ("sh", "ip", "ss", "unshare", "mount")


class Demo:
    """A running demo under a name of the test's own, as the leader of its process group."""

    _number = 0

    def __init__(self) -> None:
        Demo._number += 1
        pins = BPFFS / f"sockhop-test-{os.getpid()}-d{Demo._number}"
        self.name = f"{pins.name}-demo"
        self.pins = pins.with_name(self.name)
        self.cgroup = cgroup_root() / self.name
        self.files = Path("/run") / self.name
        self.environment = os.environ | {"SOCKHOP_BPFFS": str(pins)}
        self.lines: list[str] = []
        self.process: subprocess.Popen[str] | None = None
        self._programs: set[int] = set()
        self._namespaces: set[str] = set()

    def start(self, *what: str) -> "Demo":
        # A shell that starts us in the background may have had SIGINT ignored.
        self.process = subprocess.Popen(
            ["env", "--default-signal=INT", "--default-signal=HUP", str(SOCKHOP), "demo", *what],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=self.environment,
            start_new_session=True,
            text=True,
        )
        return self

    def read_until(self, pattern: str) -> str:
        """Read lines up to the first that *pattern* is found in."""
        assert self.process
        assert self.process.stdout
        for line in self.process.stdout:
            self.lines.append(line.rstrip("\n"))
            if re.search(pattern, line):
                return line
        pytest.fail(f"no line with {pattern!r} in:\n{self.text}")

    def end(self, seconds: float = 60) -> int:
        """Read to the end; return the exit status."""
        process, self.process = self.process, None
        assert process
        try:
            rest, _ = process.communicate(timeout=seconds)
        finally:
            if process.poll() is None:
                process.kill()
        self.lines += rest.splitlines()
        return process.returncode

    def signal(self, number: int) -> None:
        """Signal the process group, as a terminal does."""
        assert self.process
        os.killpg(self.process.pid, number)

    @property
    def text(self) -> str:
        return "\n".join(self.lines)

    def members(self) -> list[int]:
        try:
            return [int(pid) for pid in (self.cgroup / "cgroup.procs").read_text().split()]
        except OSError:
            return []

    def observe(self) -> None:
        """Remember the ids of the demo's programs and its namespace, to look for them later."""
        for pid in self.members():
            self._namespaces.add(str(Path(f"/proc/{pid}/ns/net").readlink()))
        shown = subprocess.run(
            ["bpftool", "-j", "cgroup", "show", str(self.cgroup)],
            capture_output=True,
            check=True,
            text=True,
        ).stdout
        self._programs |= {program["id"] for program in json.loads(shown.strip() or "[]")}

    def traces(self) -> list[str]:
        """What of the demo is on this machine now."""
        here = [str(path) for path in (self.pins, self.cgroup, self.files) if path.exists()]
        here += [str(path) for path in Path("/run/netns").glob(f"*{self.name}*")]
        here += [f"program {n}" for n in sorted(self._programs & _program_ids())]
        return here + list(self._processes())

    def _processes(self) -> Iterator[str]:
        own = Path("/proc/self/ns/net").readlink()
        for process in Path("/proc").iterdir():
            if not process.name.isdecimal() or process.name == str(os.getpid()):
                continue
            try:
                command = (process / "cmdline").read_bytes()
                belongs = self.name.encode() in (process / "environ").read_bytes() + command
                namespace = str((process / "ns/net").readlink())
            except OSError:
                continue
            if belongs or (namespace in self._namespaces and namespace != str(own)):
                yield f"process {process.name}: {command!r}"

    def assert_gone(self) -> None:
        # A program is freed some time after its last user has gone.
        wait_until(lambda: not self.traces(), f"nothing is left; output:\n{self.text}")


def _program_ids() -> set[int]:
    shown = subprocess.run(
        ["bpftool", "-j", "prog", "show"], capture_output=True, check=True, text=True
    ).stdout
    return {program["id"] for program in json.loads(shown)}


@pytest.fixture
def demo() -> Iterator[Demo]:
    made = Demo()
    yield made
    if made.process:
        made.process.terminate()
        made.end()


def test_shows_the_main_job_and_leaves_nothing(demo: Demo) -> None:
    begin = time.monotonic()
    demo.start()
    demo.read_until("the agent is ready")
    demo.observe()
    assert demo.traces(), "an oracle that never sees anything shows nothing"
    assert demo.end() == 0, demo.text
    seconds = time.monotonic() - begin
    demo.assert_gone()
    print(f"the demo took {seconds:.1f} s")
    assert seconds < 60  # 15 on an idle machine

    assert "\x1b" not in demo.text, "no colours in a pipe"
    assert 'backends: ["127.0.0.1:8081", "127.0.0.1:8082"]' in demo.text
    assert demo.text.count("curl: (7) Failed to connect to 10.96.0.10 port 80") == 2
    assert re.search(r"in 20 calls: backend one \d+ times, backend two \d+ times", demo.text)
    assert re.search(r"^      web +127\.0\.0\.1:8082 +TCP +active +1 +\d+$", demo.text, re.M)
    # Both ends of one connection: curl's peer is the server's own socket, and the other way.
    curl = re.search(r"ESTAB +0 +0 +(\S+) +(\S+) +users:\(\(\"curl\"", demo.text)
    assert curl, demo.text
    server = rf"ESTAB +0 +0 +{re.escape(curl[2])} +{re.escape(curl[1])} +users:\(\(\"python"
    assert re.search(server, demo.text), demo.text
    assert set(re.findall(r"LISTEN +\d+ +\d+ +(\S+)", demo.text)) == {
        "127.0.0.1:8081",
        "127.0.0.1:8082",
    }
    assert re.search(r"^      backend (one|two) from 10\.96\.0\.10:80$", demo.text, re.M)
    assert re.search(r"one served alone: [\d,]+ connects \(one [\d,]+\), 0 failures", demo.text)
    total = re.search(r"in all: ([\d,]+) connects .*\btwo [\d,]+\), 0 failures$", demo.text, re.M)
    assert total, demo.text
    assert int(total[1].replace(",", "")) >= 1000
    assert "removed: all processes" in demo.text
    assert demo.text.index("removed: all") < demo.text.index("Next, on this machine")
    assert "docs/manual.md" in demo.lines[-1]


def test_shows_how_stuck_connections_are_found_and_healed(demo: Demo) -> None:
    demo.start("stuck").read_until("an accelerator")
    demo.observe()
    assert demo.traces()
    assert demo.end() == 0, demo.text
    demo.assert_gone()
    assert re.search(r"some requests hang: \d+ of 20$", demo.text, re.M)
    assert "curl: (28) Operation timed out" in demo.text
    assert "stale sockmap entry (from here; layer: sockets: a sockmap)" in demo.text
    assert re.search(r"vanilla_sockets +addresses-ports +16 +0 +0 +16 ", demo.text)
    assert "16 of 16 stale entries deleted" in demo.text
    assert demo.text.count("nothing is wrong: 1,000 connections of 1,000 succeed") == 2
    assert "10.96.0.10:80 is a frontend of web" in demo.text
    assert re.search(r"ESTAB +127\.0\.0\.1:8080 .* web .* python", demo.text)
    assert "docs/diagnose.md" in demo.lines[-1]


def test_ctrl_c_removes_a_stranger_s_accelerator(demo: Demo) -> None:
    demo.start("stuck").read_until("from now on some requests hang")
    demo.observe()
    demo.signal(signal.SIGINT)
    assert demo.end() == 130, demo.text
    demo.assert_gone()


@pytest.mark.parametrize(
    ("moment", "number"),
    [
        ("^sockhop on Linux", signal.SIGINT),
        ("a client loop: curl", signal.SIGINT),
        ("taken out of services.yaml", signal.SIGTERM),
        ("the agent is stopped", signal.SIGHUP),
    ],
)
def test_a_signal_leaves_nothing(demo: Demo, moment: str, number: signal.Signals) -> None:
    demo.start().read_until(moment)
    if demo.cgroup.exists():
        demo.observe()
    demo.signal(number)
    assert demo.end() == 128 + number, demo.text
    demo.assert_gone()
    assert f"stopped by {number.name}" in demo.text
    assert "removed: all processes" in demo.lines[-1]
    assert "Traceback" not in demo.text


def test_a_second_ctrl_c_does_not_disturb_the_clearing(demo: Demo) -> None:
    demo.start().read_until("the agent is ready")
    demo.observe()
    for _ in range(20):
        demo.signal(signal.SIGINT)
        time.sleep(0.005)
    assert demo.end() == 130, demo.text
    demo.assert_gone()


def test_clears_what_a_killed_demo_left(demo: Demo) -> None:
    demo.start().read_until("a client loop: curl")
    demo.observe()
    demo.signal(signal.SIGKILL)
    assert demo.end() == -signal.SIGKILL
    assert demo.traces()
    demo.start().read_until("two HTTP servers")
    demo.signal(signal.SIGINT)
    assert demo.end() == 130, demo.text
    demo.assert_gone()


def test_counts_failed_connects_and_says_no(demo: Demo) -> None:
    demo.start().read_until("taken out of services.yaml")
    demo.observe()
    for pid in demo.members():
        if b"http.server\x008081" in Path(f"/proc/{pid}/cmdline").read_bytes():
            os.kill(pid, signal.SIGKILL)
    assert demo.end() == 1, demo.text
    demo.assert_gone()
    assert "sockhop: connects of the client loop failed" in demo.text
    assert re.search(r"[1-9]\d* failures; .*Couldn't connect to server", demo.text)
    assert "Next, on this machine" not in demo.text


def test_one_demo_at_a_time(demo: Demo) -> None:
    demo.start().read_until("a stage")
    second = subprocess.run(
        [SOCKHOP, "demo"], env=demo.environment, capture_output=True, text=True, check=False
    )
    assert (second.returncode, second.stderr.splitlines()[0]) == (
        3,
        "sockhop: another demo is running on this machine",
    )
    demo.signal(signal.SIGINT)
    assert demo.end() == 130


def test_missing_curl(demo: Demo, tmp_path: Path) -> None:
    for tool in TOOLS:
        found = subprocess.run(["which", tool], capture_output=True, check=True, text=True)
        (tmp_path / tool).symlink_to(found.stdout.strip())
    environment = demo.environment | {"PATH": str(tmp_path)}
    result = subprocess.run(
        [SOCKHOP, "demo"], env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 3
    assert result.stderr == (
        "sockhop: the demo needs `curl`, which is not on PATH\n  apt-get install curl\n"
    )
    demo.assert_gone()


def test_not_root(demo: Demo) -> None:
    # In a user namespace without a mapping: nobody, who may still read this checkout.
    result = subprocess.run(
        ["unshare", "--user", SOCKHOP, "demo"],
        env=demo.environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 3
    assert "the demo needs root" in result.stderr
    demo.assert_gone()


def test_mounts_a_missing_bpffs(demo: Demo) -> None:
    # In a mount namespace of its own, which takes that mount and all pins with it.
    script = 'umount -a -t bpf; exec "$0" demo'
    result = subprocess.run(
        ["unshare", "--mount", "--propagation", "private", "sh", "-c", script, SOCKHOP],
        env=demo.environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.startswith("mounted a BPF filesystem at /sys/fs/bpf")
    demo.assert_gone()
