"""What kubelet has logged of an address: in files, and in real journals, read by journalctl."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from sockhop.diagnose.kubelet import probe_failures

TARGET = "10.0.1.7:8080"
PROBE = 'prober.go] Readiness probe for POD failed (failure): Get "http://{}/health": context'
REMOTE = "/lib/systemd/systemd-journal-remote"


def entry(number: int, unit: str, message: str) -> str:
    """Return an entry in systemd's Journal Export Format."""
    fields = {
        "__REALTIME_TIMESTAMP": 1_760_000_000_000_000 + number * 1_000_000,
        "__MONOTONIC_TIMESTAMP": 1_000_000 * (number + 1),
        "_BOOT_ID": "0123456789abcdef0123456789abcdef",
        "PRIORITY": 6,
        "_HOSTNAME": "node1",
        "_SYSTEMD_UNIT": f"{unit}.service",
        "SYSLOG_IDENTIFIER": "kubelet",
        "_PID": 2931,
        "MESSAGE": message,
    }
    return "".join(f"{name}={value}\n" for name, value in fields.items()) + "\n"


def write_journal(path: Path, *entries: tuple[str, str]) -> None:
    """Write a journal with these units' messages, as a collector of journals does."""
    text = "".join(entry(number, *each) for number, each in enumerate(entries))
    subprocess.run([REMOTE, "-o", path, "-"], input=text, text=True, check=True,
                   capture_output=True)  # fmt: skip


@pytest.mark.unit
def test_lines_of_a_file(tmp_path: Path) -> None:
    log = tmp_path / "kubelet.INFO"
    lines = [
        PROBE.format(TARGET),
        PROBE.format("10.0.1.7:80801"),
        PROBE.format("110.0.1.7:8080"),
        f"connected to {TARGET}",
        f'E1121 "Probe failed" output="Get \\"http://{TARGET}/health\\": context" ' + "x" * 999,
    ]
    log.write_text("\n".join([*(["noise"] * 300_000), *lines]))
    found = probe_failures(TARGET, [log, tmp_path / "none"])
    assert [each[:20] for each in found] == [lines[0][:20], lines[4][:20]]
    assert max(map(len, found)) == 400


@pytest.mark.unit
def test_lines_of_a_journal(tmp_path: Path) -> None:
    """Those of kubelet's units, the last 2,000."""
    machine = tmp_path / ("0" * 32)
    machine.mkdir()
    failed = PROBE.format(TARGET)
    write_journal(
        machine / "system.journal",
        ("kubelet", f"too old: {failed}"),
        *[("kubelet", "noise")] * 1996,
        ("kubelet", f"first: {failed}"),
        ("web", f"not kubelet's: {failed}"),
        ("kubelet", PROBE.format("10.0.1.8:8080")),
        ("k3s-agent", f"second: {failed}"),
        ("snap.microk8s.daemon-kubelite", f"third: {failed}"),
    )
    for where in (tmp_path, machine / "system.journal"):
        found = probe_failures(TARGET, [where])
        assert [each.partition("]: ")[2].partition(":")[0] for each in found] == [
            *("first", "second", "third")
        ]
        assert "node1 kubelet[2931]: first: prober.go] Readiness probe" in found[0]


@pytest.mark.unit
def test_what_is_in_two_logs_counts_once(tmp_path: Path) -> None:
    """Those of rsyslog have what the journal has; klog's time tells one failure from another."""
    first, second = (f"I1121 15:50:0{n}.115 {PROBE.format(TARGET)}" for n in (1, 2))
    write_journal(tmp_path / "system.journal", ("kubelet", first), ("kubelet", second))
    syslog, info = tmp_path / "syslog", tmp_path / "kubelet.INFO"
    syslog.write_text(f"Nov 21 15:50:01 node1 kubelet[2931]: {first}\n")
    info.write_text(f"{second}\n{first}\n")
    found = probe_failures(TARGET, [syslog, tmp_path / "system.journal", info])
    assert [each[-len(first) :] for each in found] == [first, second]


@pytest.mark.kernel
def test_the_journal_of_this_node(tmp_path: Path) -> None:
    """Where nothing else is said: a machine's own journal, in a file system of the test's own."""
    own = "1" * 32
    (tmp_path / "machine-id").write_text(own)
    Path("/run/log").mkdir(exist_ok=True)
    (tmp_path / "journal" / own).mkdir(parents=True)
    write_journal(tmp_path / "journal" / own / "system.journal", ("kubelet", PROBE.format(TARGET)))
    script = (
        "from sockhop.diagnose.kubelet import probe_failures as of; import json;"
        f"print(json.dumps(of({TARGET!r})))"
    )
    mount = (
        'mount --bind "$0/machine-id" /etc/machine-id && mount --bind "$0" /run/log && exec "$@"'
    )
    told = subprocess.run(
        ["unshare", "-m", "sh", "-c", mount, tmp_path, sys.executable, "-c", script],
        check=True,
        capture_output=True,
    )
    (line,) = json.loads(told.stdout)
    assert line.endswith(PROBE.format(TARGET))
