"""A kernel that redirects badly is noticed, and nothing is spliced there unless forced."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from sockhop.agent import splicing
from sockhop.agent.splicing import SpliceOptions, Splicing
from sockhop.agent.state import SplicingState
from sockhop.datapath import splicecheck
from sockhop.datapath.balancer import remove_pins
from sockhop.datapath.splicecheck import check_splicing
from sockhop.datapath.splicer import splice_program, stop_splicing
from sockhop.kernel.advisories import Advisory
from sockhop.kernel.netns import current_cookie
from sockhop.model import Backend, Desired, Frontend, Protocol, Service, Splice
from tests.mutants import mutant
from tests.sandbox import Sandbox

pytestmark = pytest.mark.kernel

REDIRECT = "	bpf_msg_redirect_hash(msg, &vanilla_sockets, &key, BPF_F_INGRESS);\n"
FAULTS = {
    "redirected bytes did not arrive": "	return SK_PASS == bpf_msg_cork_bytes(msg, 1 << 20);\n",
    "redirected bytes arrived changed": (
        "	if (!bpf_msg_pull_data(msg, 0, 1, 0) && msg->data + 1 <= msg->data_end)\n"
        "		*(char *)msg->data ^= 1;\n" + REDIRECT
    ),
}


def test_this_kernel() -> None:
    assert check_splicing() == ""


@pytest.mark.parametrize("said", FAULTS)
def test_a_fault_is_noticed(said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The program does what a kernel could: keep the bytes to itself, change one."""
    path = mutant(tmp_path, "vanilla", (REDIRECT, FAULTS[said]))
    monkeypatch.setattr(splicecheck, "object_path", lambda _: path)
    monkeypatch.setattr(splicecheck, "_PATIENCE", 200)
    assert said in check_splicing()


@pytest.fixture
def pins(sandbox: Sandbox) -> Iterator[Path]:
    sandbox.pins.mkdir(mode=0o700)
    try:
        yield sandbox.pins
    finally:
        stop_splicing(sandbox.pins, sandbox.cgroup)
        remove_pins(sandbox.pins)


HANG = Advisory("CVE-0000-1", "a made-up hang", ("1.0",), (), "splice", "hang")
RACE = HANG._replace(name="CVE-0000-2", effect="race")


@pytest.mark.parametrize(
    ("broken", "faults", "force", "state"),
    [
        ("", [], False, ("on", "")),
        ("", [RACE], False, ("on", "")),
        ("", [RACE, HANG], False, ("faulty", "this kernel has CVE-0000-1")),
        ("", [HANG], True, ("on", "")),
        ("bytes are lost", [], False, ("faulty", "bytes are lost")),
        ("bytes are lost", [], True, ("on", "")),
    ],
)
def test_nothing_is_spliced_there(
    sandbox: Sandbox,
    pins: Path,
    monkeypatch: pytest.MonkeyPatch,
    broken: str,
    faults: list[Advisory],
    force: bool,
    state: tuple[str, str],
) -> None:
    monkeypatch.setattr(splicing, "check_splicing", lambda: broken)
    monkeypatch.setattr(splicing, "known_faults", lambda: faults)
    found = SplicingState()
    here = Splicing(
        pins, sandbox.cgroup, found, options=SpliceOptions(force=force), home=current_cookie()
    )
    backend = Backend("127.0.0.1", 8080)
    frontend = Frontend("10.96.0.1", 80, Protocol.TCP, backends=(backend,))
    here.apply(Desired((Service("web", (frontend,), splice=Splice.ON),)), {"web": 1})
    here.close()
    assert (found.state, found.reason) == state
    assert bool(splice_program(pins, sandbox.cgroup)) == (state[0] == "on")
    assert found.faults == [f"{each.name}: {each.title}" for each in faults]
