"""Doctor on services of ours: which backend it is, and what is wrong there."""

import os
from collections.abc import Iterator

import pytest

from sockhop.diagnose.causes import Cause
from sockhop.diagnose.dial import Question, Result
from sockhop.diagnose.doctor import Diagnosis, diagnose
from sockhop.diagnose.matrix import Origin
from sockhop.kernel import netns
from sockhop.kernel.cgroups import cgroup_root
from sockhop.kernel.namespaces import Namespace
from sockhop.model import pack_address
from tests.diagnose.invoke import sockhop
from tests.diagnose.load import SERVER, Server
from tests.sandbox import compact
from tests.splice.stage import Stage

pytestmark = pytest.mark.kernel

FRONTEND = "10.96.0.1"


@pytest.fixture
def stage() -> Iterator[Stage]:
    with Stage(spliced=False) as made:
        yield made


def ask(stage: Stage, *, count: int = 4) -> Diagnosis:
    """Dial the frontend from the namespace that has no server."""
    with netns.entered(stage.other):
        place = Namespace(netns.inode(stage.other), netns.current_cookie(), stage.other)
    question = Question(pack_address(FRONTEND), 80, "/health", count, 0.8)
    return diagnose(question, [Origin("far", place)], stage.sandbox.pins)


def manifest(*servers: Server, **more: object) -> str:
    ports = [f"{SERVER}:{each.port}" for each in servers]
    return compact(
        web={
            "frontends": [f"{FRONTEND}:80"],
            "backends": ports,
            "algorithm": "round-robin",
            **more,
        }
    )


def test_the_backend_that_hangs_is_named(stage: Stage) -> None:
    """It is in another namespace than who dials, and others of the service answer."""
    with Server(stage) as good, Server(stage, "nothing") as bad:
        path = stage.sandbox.manifest(manifest(good, bad))
        with stage.sandbox.agent(path):
            found = ask(stage)
            bad.does = "answer"
            healed = ask(stage)
    assert (found.service, healed.service) == ("web", "web")
    assert {(each.backend, each.failed, each.attempts) for each in found.backends} == {
        (f"{SERVER}:{good.port}", 0, 2),
        (f"{SERVER}:{bad.port}", 2, 2),
    }
    (only,) = found.conclusions
    assert only.cause is Cause.NOT_ANSWERING
    assert only.because.startswith(f"at the backend {SERVER}:{bad.port}: the request has arrived; ")
    assert f"/{os.getpid()} has read it, and says nothing" in only.because
    assert (healed.conclusions, healed.dialled[0].results) == ([], {Result.ANSWERED: 4})


def test_only_the_backend_that_is_gone_is_named(stage: Stage) -> None:
    with Server(stage) as good:
        with Server(stage) as bad:
            pass
        with stage.sandbox.agent(stage.sandbox.manifest(manifest(good, bad))):
            found = ask(stage)
            told = sockhop(
                stage.sandbox, "doctor", f"{FRONTEND}:80", "--from", stage.other.name, "--alone"
            )
    (only,) = found.conclusions
    assert only.cause is Cause.BACKEND_GONE
    assert f"{SERVER}:{bad.port}, dialled by itself: refused" in only.because
    assert not any("ping" in line for line in found.evidence), "no host has a frontend's address"
    assert told.returncode == 1
    assert told.stdout.startswith(f"{FRONTEND}:80 is a frontend of web\n")
    assert f"\n{SERVER}:{bad.port}" in told.stdout


def test_who_is_not_balanced_is_told_so(stage: Stage) -> None:
    other = stage.sandbox.cgroup / "other"
    clients = {"cgroups": [f"/{other.relative_to(cgroup_root())}"]}
    with Server(stage) as good:
        path = stage.sandbox.manifest(manifest(good, clients=clients))
        with stage.sandbox.agent(path):
            (only,) = ask(stage, count=1).conclusions
    assert only.cause is Cause.NOT_BALANCED
    assert only.layer == "balancing"
