"""`sockhop resteer`: what it means, what it would do, what it does, and what is on record."""

import json
import socket
from typing import Any

import pytest

from tests.datapath.programs import Program
from tests.datapath.udp import Echoes, both
from tests.resteer.stage import VIP, Stage, ask, at, fate

pytestmark = pytest.mark.kernel


@pytest.fixture(autouse=True)
def _dialled(program: Program) -> None:
    program.dial(VIP)


def run(node: Stage, program: Program, *options: str, status: int = 0) -> tuple[Any, str]:
    """Run the command on the program's socket; return its only row and what it says."""
    result = node.sandbox.sockhop(
        "resteer", f"cookie = {program.cookie}", "-o", "json", *options, check=False
    )
    assert result.returncode == status, result.stderr
    (row,) = json.loads(result.stdout)
    return row, result.stderr.strip()


def events(node: Stage, cookie: int) -> list[tuple[str, str]]:
    result = node.sandbox.sockhop("events", "-o", "json", check=False)
    every = json.loads(result.stdout or "[]")
    return [(each["kind"], each["reason"]) for each in every if each.get("cookie") == cookie]


def test_it_says_what_it_would_do_and_does_it(
    node: Stage, echoes: Echoes, program: Program
) -> None:
    node.install(at(1, *both(1, 2)))
    row, said = run(node, program)
    assert (row["action"], row["why"]) == ("resteered", "to 127.0.1.2:7000")
    assert said == "1 socket would be resteered; nothing was done: --yes does it"
    assert ask(program, echoes) == 1
    assert events(node, program.cookie) == []
    row, said = run(node, program, "--yes")
    assert (row["action"], row["why"]) == ("resteered", "to 127.0.1.2:7000")
    assert said == "1 socket resteered"
    assert ask(program, echoes) == 2
    text = f"by hand: cookie = {program.cookie}; to 127.0.1.2:7000"
    assert events(node, program.cookie) == [("resteered", text)]
    explained = node.sandbox.sockhop("explain", str(program.cookie)).stdout
    assert "chosen by      resteer" in explained or "chosen by    resteer" in explained


def test_what_cannot_be_moved_is_left_unless_severing_is_asked_for(
    node: Stage, program: Program
) -> None:
    node.install()
    why = "not moved: 10.9.0.1:53 is no frontend any more"
    for options in ((), ("--yes",)):
        row, said = run(node, program, *options, status=1)
        assert (row["action"], row["why"]) == ("left", why)
        assert said.startswith("0 sockets ")
    assert fate(program) == ""
    row, said = run(node, program, "--sever")
    assert (row["action"], row["why"]) == ("severed", why)
    assert "0 sockets would be resteered, 1 would be severed" in said
    assert fate(program) == ""
    row, said = run(node, program, "--sever", "--yes")
    assert said == "0 sockets resteered, 1 severed"
    assert fate(program) == "ECONNABORTED"
    assert events(node, program.cookie)[0][0] == "severed"


def test_tcp_is_only_severed(node: Stage, program: Program) -> None:
    with socket.create_server(("127.0.1.1", 7000)):
        program.do("own = socket.create_connection(('127.0.1.1', 7000))")
        row, _ = run(node, program, "--yes", status=1)
        assert (row["action"], row["why"]) == (
            "left",
            "not moved: it is no connected UDP socket",
        )
        row, _ = run(node, program, "--yes", "--sever")
        assert row["action"] == "severed"
    assert fate(program) == "ECONNABORTED"


def test_nothing_is_meant(node: Stage) -> None:
    result = node.sandbox.sockhop("resteer", "service = nosuch", check=False)
    assert (result.returncode, result.stderr) == (1, "no socket is meant by that\n")
    result = node.sandbox.sockhop("resteer", " ", "--yes", check=False)
    assert result.returncode == 2


def test_without_anything_installed(node: Stage) -> None:
    environment = node.sandbox.environment | {"SOCKHOP_BPFFS": "/sys/fs/bpf/sockhop-none"}
    result = node.sandbox.sockhop("resteer", "state all", env=environment, check=False)
    assert result.returncode == 3
    assert "nothing is installed here" in result.stderr
