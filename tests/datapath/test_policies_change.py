"""A change of policies is atomic: no socket meets a mix of two, or none."""

import errno
import os
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from sockhop.agent import policy_installer
from sockhop.agent.policy_installer import PolicyInstaller
from sockhop.datapath.policies import PolicySetting
from sockhop.kernel import syscall
from sockhop.kernel.maps import Map
from sockhop.kernel.syscall import KernelError
from sockhop.model import Policy
from tests.datapath.node import Node
from tests.datapath.rules import Policed, allow, deny, rule, verdict

pytestmark = pytest.mark.kernel

CHANGES = int(os.environ.get("SOCKHOP_POLICY_CHANGES", "60"))
ALWAYS_DENIED, ALWAYS_ALLOWED = "127.0.9.1", "127.0.8.1"


def states() -> tuple[list[Policy], list[Policy]]:
    """Two ways to deny one address and allow another: what one lacks, the other has."""
    many = [rule(f"10.0.{i}.0/24") for i in range(100)]
    return (
        [deny(rule(f"{ALWAYS_DENIED}/32"), name="a"), deny(*many, name="many")],
        [allow(rule(f"{ALWAYS_ALLOWED}/32"), *many, name="b")],
    )


def wrong_verdicts(policed: Policed, flip: Callable[[list[Policy]], None]) -> int:
    """Change to and fro while all cores connect; return how many verdicts were wrong."""
    both = states()
    flip(both[0])
    stop = threading.Event()
    wrong: list[str] = []
    tried = [0, 0]

    def client(number: int) -> None:
        while not stop.is_set():
            tried[number] += 1
            if not verdict(ALWAYS_DENIED):
                wrong.append("let through")
            if verdict(ALWAYS_ALLOWED):
                wrong.append("denied")

    threads = [threading.Thread(target=client, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    end = time.monotonic() + 10
    for number in range(CHANGES):
        flip(both[1 - number % 2])
        if wrong or time.monotonic() > end + CHANGES:
            break
    stop.set()
    for thread in threads:
        thread.join()
    assert wrong or min(tried) > CHANGES
    return len(wrong)


def test_no_socket_meets_a_mix(node: Node) -> None:
    with Policed(node) as policed:
        assert wrong_verdicts(policed, lambda policies: _apply(policed, policies)) == 0
        assert policed.maps.setting(PolicySetting.LOST) == 0


def _apply(policed: Policed, policies: list[Policy]) -> None:
    policed.apply(*policies)


def test_a_mutant_that_stores_the_word_first(node: Node) -> None:
    with Policed(node) as policed:
        write = PolicyInstaller._write

        def late(self: PolicyInstaller, table: object, epoch: int, ids: object) -> None:
            self._set(PolicySetting.WORD, epoch << 32)
            write(self, table, epoch, ids)  # type: ignore[arg-type]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(PolicyInstaller, "_write", late)
            assert wrong_verdicts(policed, lambda policies: _apply(policed, policies))


def test_a_mutant_that_takes_all_away_first(node: Node) -> None:
    with Policed(node) as policed:

        def flip(policies: list[Policy]) -> None:
            policed.apply()
            syscall.grace_period()
            policed.apply(*policies)

        assert wrong_verdicts(policed, flip)


def used(policed: Policed) -> tuple[int, ...]:
    maps = policed.maps
    return maps.clients.used(), maps.networks.used(), maps.ports.used()


def test_what_fails_half_way_leaves_nothing(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    """No memory for an entry, say: the next try finds the room that there was."""
    first, second = states()
    store = PolicyInstaller._store

    def refuse(*_: object) -> None:
        raise KernelError("writing", errno.ENOMEM)

    def half(self: PolicyInstaller, target: Map[Any, Any], entries: Any) -> None:
        store(self, target, entries)
        if target is self._maps.networks:
            refuse()

    with Policed(node) as policed:
        policed.apply(*first)
        before = used(policed)
        for place, name, broken in (
            (PolicyInstaller, "_store", half),
            (policy_installer, "grace_period", refuse),
        ):
            with monkeypatch.context() as patch:
                patch.setattr(place, name, broken)
                with pytest.raises(KernelError):
                    policed.apply(*second)
            if broken is half:
                assert used(policed) == before
        policed.apply(*second)
        after = used(policed)
        policed.apply(*first)
        policed.apply(*second)
        assert used(policed) == after
