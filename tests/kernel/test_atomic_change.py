"""Design rule 2: a reader sees the old backends or the new ones, never a mix, never none."""

import os
from pathlib import Path

import pytest

from sockhop.agent import installer as installer_module
from sockhop.agent.installer import Installer
from sockhop.agent.plan import InstalledEntry, InstalledMember, make_plan
from sockhop.agent.target import Member, expand
from sockhop.datapath.records import FrontendKey, SlotKey, word
from sockhop.kernel.netns import current_cookie
from sockhop.model import Algorithm, Protocol
from tests.kernel.hammer import Result, backends, desired, hammer
from tests.mutants import mutant
from tests.sandbox import Sandbox

pytestmark = [pytest.mark.kernel, pytest.mark.timeout(600)]

FLIPS = int(os.environ.get("SOCKHOP_FLIPS", "100000"))

TAKE_ANY = (
    "	return READ_ONCE(found->key.frontend) == key->frontend &&\n"
    "	       READ_ONCE(found->key.generation) == key->generation &&\n"
    "	       READ_ONCE(found->key.position) == key->position;\n",
    "	return true;\n",
)
ASK_ONCE = ("#define ATTEMPTS 4", "#define ATTEMPTS 1")
NO_GENERATION = ("key.generation = WORD_GENERATION(now);", "key.generation = 1;")
# A reader that dawdles between the word and the slot, some 200 microseconds, meets every change.
DAWDLE = (
    "key.generation = WORD_GENERATION(now);",
    "key.generation = WORD_GENERATION(now);\n"
    "		for (int i = 0; i < 8000; i++)\n"
    "			bpf_ktime_get_boot_ns();",
)


def show(result: Result) -> None:
    print(f"{result.flips:,} flips, {result.connects:,} connects, {result}")


def test_a_change_is_atomic(sandbox: Sandbox) -> None:
    result = hammer(sandbox, flips=FLIPS, seconds=400)
    show(result)
    assert result.flips >= FLIPS
    assert result.connects > FLIPS / 10
    assert (result.misses, result.wrong) == (0, 0)


def write_plain_slots(installer: Installer, parity: int) -> None:
    """Slots without a generation, overwritten where they are, the surplus deleted."""
    maps, installed = installer._maps, installer.installed
    changed: dict[FrontendKey, InstalledEntry] = {}
    words, surplus = [], []
    for key, old in installed.entries.items():
        wanted = backends(int(old.entry.service[1:]), parity) if old.entry.backends else ()
        for backend in wanted:
            member = Member(old.entry.service, backend.address, backend.port, Protocol.UDP)
            installed.members.setdefault(member, InstalledMember(backend, len(installed.members)))
        changed[key] = InstalledEntry(old.entry._replace(backends=wanted), old.id, 1)
        words.append((old.id, word(1, Algorithm.RANDOM, len(wanted))))
        surplus += [SlotKey(old.id, 1, position) for position in range(len(wanted), 3)]
    maps.slots.update_encoded(list(installer._slot_rows(changed)))
    maps.slots.delete_many(surplus)
    maps.words.update_many(words)


def test_plain_slots_are_noticed(sandbox: Sandbox, tmp_path: Path) -> None:
    path = mutant(tmp_path, "balance", TAKE_ANY, ASK_ONCE, NO_GENERATION)
    result = hammer(sandbox, flips=10**9, seconds=90, write=write_plain_slots, path=path)
    show(result)
    assert result.misses + result.wrong > 0


def test_words_before_slots_are_noticed(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    """The flip in the wrong order: the word names slots that are not there yet."""

    def publish_words_first(self: Installer, plan, generation: int) -> None:  # type: ignore[no-untyped-def]
        for key, entry in plan.flipped.items():
            old = self.installed.entries[key]
            self._maps.words.set(old.id, word(generation, entry.algorithm, len(entry.backends)))
        publish(self, plan, generation)

    publish = Installer._publish
    monkeypatch.setattr(Installer, "_publish", publish_words_first)
    result = hammer(sandbox, flips=10**9, seconds=90)
    show(result)
    assert result.misses > 0


def write_few_at_a_time(installer: Installer, parity: int) -> None:
    """Little time between a word and the end of the old slots."""
    target = expand(desired(parity), current_cookie())
    keys = list(target.entries)
    for first in range(0, len(keys), 16):
        plan = make_plan(target, installer.installed)
        few = {key: plan.flipped[key] for key in keys[first : first + 16] if key in plan.flipped}
        installer.apply(plan._replace(flipped=few, gone=()))
    installer.apply(make_plan(target, installer.installed))


def test_grace_alone_protects_a_slow_reader(sandbox: Sandbox, tmp_path: Path) -> None:
    path = mutant(tmp_path, "balance", TAKE_ANY, ASK_ONCE, DAWDLE)
    result = hammer(sandbox, flips=5000, seconds=60, write=write_few_at_a_time, path=path)
    show(result)
    assert (result.misses, result.wrong) == (0, 0)


def test_a_missing_grace_period_is_noticed(
    sandbox: Sandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(installer_module, "grace_period", lambda: None)
    path = mutant(tmp_path, "balance", TAKE_ANY, ASK_ONCE, DAWDLE)
    result = hammer(sandbox, flips=10**9, seconds=90, write=write_few_at_a_time, path=path)
    show(result)
    assert result.misses + result.wrong > 0
