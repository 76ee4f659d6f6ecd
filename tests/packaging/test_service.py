"""packaging/sockhop.service: its capabilities are the least, its sandbox lets the agent work."""

import json
import re
import shutil
import signal
import socket
import subprocess
from pathlib import Path

import pytest

from sockhop.kernel.host import CAPABILITIES
from tests.packaging.container import SYSTEMD, Container
from tests.sandbox import SOCKHOP, Sandbox, ServerThread, compact, wait_until

UNIT = Path(__file__).parents[2] / "packaging" / "sockhop.service"
FRONTEND = "10.96.0.1"
ELSEWHERE = "10.77.0.1"  # not a loopback address
MANIFEST = "/etc/sockhop/services.yaml"
needs_systemd = pytest.mark.skipif(not SYSTEMD.exists(), reason="systemd is not installed")
needs_analyze = pytest.mark.skipif(
    not shutil.which("systemd-analyze"), reason="systemd-analyze is not installed"
)


def unit_capabilities() -> list[str]:
    """Those that it cannot start without, and then those for live sockets elsewhere."""
    found = re.findall(r"^CapabilityBoundingSet=(.*)$", UNIT.read_text(), re.MULTILINE)
    return [name for line in found for name in line.split()]


NEEDED = ["CAP_BPF", "CAP_NET_ADMIN", "CAP_PERFMON"]


def confinement(capabilities: list[str]) -> tuple[str, ...]:
    """The command that leaves root just these, as systemd does for the unit."""
    kept = [f"+{name.removeprefix('CAP_').lower()}" for name in capabilities]
    bounding = ("--bounding-set", ",".join(["-all", *kept]))
    return ("setpriv", *bounding, "--inh-caps", "-all", "--no-new-privs")


class Confined(Sandbox):
    """A sandbox whose commands run with fewer capabilities when told so."""

    confinement: tuple[str, ...] = ()

    def __enter__(self) -> "Confined":
        super().__enter__()
        return self

    def inside(self, *command: str) -> list[str]:
        return super().inside(*self.confinement, *command)

    def limited(self, capabilities: list[str], *arguments: str) -> int:
        """Run the command line with only these capabilities; return its exit status."""
        self.confinement = confinement(capabilities)
        try:
            return int(self.sockhop(*arguments, check=False).returncode)
        finally:
            self.confinement = ()


def dial() -> str:
    with socket.create_connection((FRONTEND, 80), timeout=5) as connection:
        return connection.recv(64).decode()


def web(backend: str) -> str:
    return compact(web={"frontends": [f"{FRONTEND}:80/tcp"], "backends": [backend]})


def checked_elsewhere(container: Container) -> list[str]:
    """Have a backend checked that is not on loopback, and does not listen; return the findings."""
    services = container.run("cat", MANIFEST).stdout
    health = {"tcp": {}, "interval": "100ms", "fall": 1}
    service = {"frontends": [f"{FRONTEND}:80"], "backends": [f"{ELSEWHERE}:1"], "health": health}
    container.write(MANIFEST, compact(web=service))

    def unhealthy() -> list[str]:
        status = container.run("/opt/sockhop/bin/sockhop", "status", "-o", "json", check=False)
        health = json.loads(status.stdout)["agent"]["health"]
        return [each["reason"] for each in health["unhealthy"]]

    found: list[str] = wait_until(unhealthy, "a check fails")
    container.write(MANIFEST, services)
    return found


@pytest.mark.kernel
def test_the_units_capabilities_are_enough_for_the_agent() -> None:
    bits = {name: each.bit for name, each in CAPABILITIES.items()}
    bits |= {"CAP_SYS_PTRACE": 19, "CAP_SYS_ADMIN": 21}  # include/uapi/linux/capability.h
    mask = sum(1 << bits[name] for name in unit_capabilities())
    with Confined(loopback=(f"{FRONTEND}/32",)) as sandbox, ServerThread("one", "127.0.0.1") as one:
        manifest = sandbox.manifest(web(one.endpoint))
        sandbox.confinement = confinement(unit_capabilities())
        with sandbox.agent(manifest, "--detach-on-exit", "--metrics", "127.0.0.1:9464") as agent:
            status = Path(f"/proc/{agent.process.pid}/status").read_text()
            assert f"CapEff:\t{mask:016x}\n" in status
            assert f"CapBnd:\t{mask:016x}\n" in status
            assert dial() == "one"
            with ServerThread("two", "127.0.0.1") as two:
                before = agent.status()["generation"]
                sandbox.manifest(web(two.endpoint))
                agent.wait_generation(before)
                assert dial() == "two"
            assert agent.stop(signal.SIGTERM) == 0
        assert not sandbox.pins.exists()


@pytest.mark.kernel
@pytest.mark.parametrize("dropped", NEEDED)
def test_one_capability_fewer_is_too_few(dropped: str) -> None:
    with Confined() as sandbox:
        manifest = sandbox.manifest(web("127.0.0.1:8080"))
        assert set(NEEDED) < set(unit_capabilities())
        rest = [name for name in NEEDED if name != dropped]
        assert sandbox.limited(rest, "agent", "-f", str(manifest)) == 3
        assert not sandbox.pins.exists()


@pytest.mark.kernel
def test_what_the_command_line_needs_is_as_documented() -> None:
    lister = ["CAP_BPF", "CAP_PERFMON"]
    with Confined() as sandbox:
        with sandbox.agent(sandbox.manifest(web("127.0.0.1:8080"))):
            for arguments in (["status"], ["get", "services"], ["get", "backends"]):
                assert sandbox.limited(["CAP_BPF"], *arguments) == 0, arguments
            assert sandbox.limited(lister, "get", "sockets") == 0
            for dropped in lister:
                rest = [name for name in lister if name != dropped]
                assert sandbox.limited(rest, "get", "sockets") == 3, dropped
        assert sandbox.limited(["CAP_BPF"], "detach") == 3
        assert sandbox.limited(lister, "detach") == 0
        assert not sandbox.pins.exists()


@pytest.mark.unit
@needs_analyze
def test_systemd_knows_every_setting_and_rates_it_ok(tmp_path: Path) -> None:
    copy = tmp_path / UNIT.name
    copy.write_text(UNIT.read_text().replace("/opt/sockhop/bin/sockhop", str(SOCKHOP)))
    verified = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", copy], check=True, capture_output=True, text=True
    )
    assert UNIT.name not in verified.stderr
    rated = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", "--json=short", "--threshold=30", copy],
        check=False,
        capture_output=True,
        text=True,
    )
    assert rated.returncode == 0, rated.stdout  # exposure at most 3.0 of 10
    open_doors = {row["json_field"] for row in json.loads(rated.stdout) if row["set"] is False}
    assert "NoNewPrivileges" not in open_doors
    assert "ProtectSystem" not in open_doors


@pytest.mark.kernel
@needs_systemd
def test_under_systemd_it_balances_reloads_restarts_and_stops(tmp_path: Path) -> None:
    with Container(tmp_path, UNIT, web("127.0.0.1:8080")) as container:
        serve = "cd /opt/source && exec /opt/python/bin/python3 -m http.server -b 127.0.0.1 8080"
        for address in (FRONTEND, ELSEWHERE):
            container.run("ip", "address", "add", f"{address}/32", "dev", "lo")
        container.run("sh", "-c", f"({serve}) >/dev/null 2>&1 &")
        ask = ("curl", "-s", "-o", "/dev/null", "-w", "%{http_code}")

        def answer(host: str) -> str:
            return str(container.run(*ask, f"http://{host}/", check=False).stdout)

        wait_until(lambda: answer("127.0.0.1:8080") == "200", "a server")
        assert answer(FRONTEND) == "000"
        assert container.systemctl("start", "sockhop", check=False).returncode == 0, container.log()
        assert answer(FRONTEND) == "200"

        first = container.show("MainPID")
        status = container.run("cat", f"/proc/{first}/status").stdout
        assert "NoNewPrivs:\t1\n" in status
        assert "Seccomp:\t2\n" in status
        assert container.run("curl", "-s", "127.0.0.1:9464/healthz").stdout == "ok\n"
        # Mounted by the unit; pins made behind its mounts are there for everybody.
        assert container.run("ls", "/sys/fs/bpf/sockhop/links").stdout.split()
        assert checked_elsewhere(container) == ["TCP connect: Connection refused"]
        container.systemctl("reload", "sockhop")
        wait_until(lambda: "SIGHUP" in container.log(), "the reload is logged")

        with container.drop_in("WatchdogSec=3s\nRestartSec=100ms"):
            container.systemctl("restart", "sockhop")
            stuck = container.show("MainPID")
            container.run("kill", "-STOP", stuck)
            wait_until(
                lambda: (
                    container.show("NRestarts") != "0" and container.show("SubState") == "running"
                ),
                "the watchdog restarts a stuck agent",
                60,
            )
        container.systemctl("stop", "sockhop")
        assert answer(FRONTEND) == "200"
        container.run("/opt/sockhop/bin/sockhop", "detach")
        assert answer(FRONTEND) == "000"

        # A manifest that does not parse is tried again, and found when it is mended.
        mend = container.run("cat", MANIFEST).stdout
        container.write(MANIFEST, "services: [")
        with container.drop_in("RestartSec=100ms"):
            assert container.systemctl("start", "sockhop", check=False).returncode != 0
            assert "did not find expected" in container.log()
            container.write(MANIFEST, mend)
            wait_until(lambda: container.show("SubState") == "running", "a running service")
        container.systemctl("stop", "sockhop")
        container.run("/opt/sockhop/bin/sockhop", "detach")

        # What the unit would be without its comment on ProtectKernelTunables=.
        with container.drop_in("ProtectKernelTunables=yes"):
            assert container.systemctl("start", "sockhop", check=False).returncode != 0
            assert "Read-only file system" in container.log()
            assert container.show("ExecMainStatus") == "3"
