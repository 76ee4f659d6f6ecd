"""With the capabilities of the unit, and no others, an agent moves and ends sockets."""

import re
import socket
from pathlib import Path

import pytest

import tests.sandbox
from sockhop.kernel import cgroups
from tests.agent.test_enforce import ask, error_of
from tests.agent.test_policies import manifest
from tests.sandbox import SOCKHOP, Sandbox, ServerThread, publish, wait_until

pytestmark = pytest.mark.kernel

UNIT = Path(__file__).parents[2] / "packaging/sockhop.service"
VIP = "10.0.0.10"


def test_a_socket_is_moved_with_the_units_capabilities(
    sandbox: Sandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = re.findall(r"^CapabilityBoundingSet=(.+)", UNIT.read_text(), re.MULTILINE)
    names = [name.lower().removeprefix("cap_") for line in lines for name in line.split()]
    assert "dac_read_search" not in names
    allowed = ",".join(["-all", *(f"+{name}" for name in names)])
    program = tmp_path / "sockhop"
    program.write_text(
        f'#!/bin/sh\nexec setpriv --bounding-set={allowed} --inh-caps={allowed} {SOCKHOP} "$@"\n'
    )
    program.chmod(0o755)
    monkeypatch.setattr(tests.sandbox, "SOCKHOP", program)

    def state(*servers: ServerThread) -> str:
        backends = [server.endpoint for server in servers]
        dns = {"name": "dns", "frontends": [f"{VIP}:53/udp"], "backends": backends}
        return manifest(services=[dns])

    with (
        ServerThread("one", "10.96.0.1", 5301, udp=True) as one,
        ServerThread("two", "10.96.0.1", 5302, udp=True) as two,
    ):
        path = sandbox.manifest(state(one))
        with (
            sandbox.agent(path, "--brake", "off") as agent,
            socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client,
        ):
            client.settimeout(5)
            client.connect((VIP, 53))
            assert ask(client) == "one"
            publish(path, state(two))
            wait_until(lambda: agent.status()["generation"] == 2, "the change")
            wait_until(lambda: ask(client) == "two", "a socket that is moved")
            assert error_of(client) == 0
            monkeypatch.setattr(tests.sandbox, "SOCKHOP", SOCKHOP)  # what removes it may do all


def test_the_cgroups_above_one_are_found_without_a_right(sandbox: Sandbox) -> None:
    group = sandbox.cgroup / "a"
    group.mkdir()
    try:
        number = cgroups.cgroup_id(group)
        found = list(cgroups.cgroups_above(number))
        assert found[:2] == [number, cgroups.cgroup_id(sandbox.cgroup)]
        command = f"from sockhop.kernel.cgroups import *; print(*cgroups_above({number}))"
        python = str(SOCKHOP.with_name("python"))
        weak = ("setpriv", "--bounding-set=-dac_read_search", "--inh-caps=-dac_read_search")
        said = sandbox.run(*weak, python, "-c", command).stdout
        assert list(map(int, said.split())) == found
    finally:
        group.rmdir()
    assert list(cgroups.cgroups_above(number)) == []
