"""The advisory data, and which kernels it suspects."""

import json
import os
import subprocess

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sockhop.kernel.advisories import (
    advisories,
    is_affected,
    is_upstream,
    known_faults,
    parse_release,
    running_release,
    with_patch_level,
)
from tests.sandbox import SOCKHOP

INCIDENT = "5.10.134-16.al8"
SUFFIXES = st.sampled_from(["", "-rc1", "-16.al8", "-50-cloud-amd64", "+", "-fc-v657"])
NUMBERS = st.tuples(st.integers(1, 99), st.integers(0, 99), st.integers(0, 400))


def run(*arguments: str) -> tuple[int, str, str]:
    done = subprocess.run(
        [SOCKHOP, "advisories", *arguments],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


@pytest.mark.unit
@settings(max_examples=40, deadline=None)
@given(NUMBERS, SUFFIXES)
def test_a_release_is_read(version: tuple[int, int, int], suffix: str) -> None:
    text = ".".join(map(str, version)) + suffix
    assert parse_release(text) == version
    assert is_upstream(text) == (suffix in ("", "-rc1"))


@pytest.mark.unit
@settings(max_examples=40, deadline=None)
@given(st.text(max_size=20))
def test_whatever_is_given_is_a_version_or_none(text: str) -> None:
    assert all(number >= 0 for number in parse_release(text))


@pytest.mark.unit
def test_the_data_is_sound() -> None:
    names = [each.name for each in advisories()]
    assert len(names) == len(set(names)) > 60
    for each in advisories():
        for versions in (each.introduced, each.fixed):
            read = [parse_release(version) for version in versions]
            assert read == sorted(read), each
            assert all(map(is_upstream, versions)), each
            series = [version[:2] for version in read[:-1]]  # mainline's may be .0 of the last
            assert len(series) == len(set(series)), each
        assert each.used_by in ("splice", "sockmap", "sever", "iterators", "balance")
        assert each.effect in ("crash", "hang", "corrupt", "leak", "race", "stale", "")


@pytest.mark.unit
@settings(max_examples=40, deadline=None)
@given(NUMBERS)
def test_a_fix_holds_for_the_rest_of_its_series(version: tuple[int, int, int]) -> None:
    later = (*version[:2], version[2] + 1)
    for each in advisories():
        came = any(parse_release(text)[:2] == later[:2] for text in each.introduced)
        if is_affected(each, version) is False and not came:
            assert is_affected(each, later) is False, each


@pytest.mark.unit
def test_the_fault_of_the_incident_is_named() -> None:
    """A vendor's 5.10.134; 5.10.56 ran for years without it, and upstream fixed it in 6.0."""
    for release, affected in ((INCIDENT, True), ("5.10.56", False), ("5.10.222", False),
                              ("5.13.19", False), ("5.17.3", True), ("6.1.1", False)):  # fmt: skip
        found = [each.name for each in known_faults("splice", release)]
        assert ("SOCKHOP-1" in found) == affected, release


@pytest.mark.unit
def test_the_command_names_it_and_says_that_a_vendors_kernel_needs_the_probe() -> None:
    status, told, _ = run("--kernel", INCIDENT)
    assert status == 1
    assert "Fix sk->sk_forward_alloc warn_on in sk_stream_kill_queues" in told
    assert "its version proves nothing: run `sockhop advisories` on it" in told
    assert "sockhop heal" in told
    assert "tried:" not in told
    report = json.loads(run("--kernel", INCIDENT, "-o", "json")[1])
    (fault,) = (each for each in report["faults"] if each["fault"] == "SOCKHOP-1")
    assert (fault["affected"], fault["effect"]) == ("perhaps", "stale")
    assert fault["fixed"] == ["5.10.222", "5.15.79", "6.0"]
    assert (report["vendor"], report["tried"]) == (True, [])
    assert json.loads(run("--kernel", "5.10.134", "-o", "json")[1])["vendor"] is False


@pytest.mark.unit
def test_what_is_no_version_is_refused() -> None:
    for text in ("bookworm", "", "6", "-1.2"):
        status, told, error = run("--kernel", text)
        assert (status, told) == (2, ""), text
        assert error.startswith(f"sockhop: --kernel {text}: this is no kernel version")


@pytest.mark.unit
def test_a_kernel_too_new_for_the_data_has_what_was_never_fixed() -> None:
    status, told, _ = run("--kernel", "99.0", "-o", "json")
    names = [each["fault"] for each in json.loads(told)["faults"] if each["affected"] == "perhaps"]
    assert names == ["SOCKHOP-2"]
    assert status == 1


@pytest.mark.unit
@pytest.mark.parametrize(
    ("release", "told", "found"),
    [
        ("6.1.0-50-cloud-amd64", "#1 SMP Debian 6.1.176-1 (2026-10-01)",
         "6.1.176-1 (6.1.0-50-cloud-amd64)"),
        ("5.15.0-91-generic", "Ubuntu 5.15.131", "5.15.131 (5.15.0-91-generic)"),
        ("6.12.95+deb12-cloud-amd64", "#1 SMP Debian 6.12.95-1~bpo12+1 (2026-10-01)",
         "6.12.95-1~bpo12+1 (6.12.95+deb12-cloud-amd64)"),
        ("6.18.44", "#1 SMP PREEMPT_DYNAMIC Thu Oct 1 2026", "6.18.44"),
        # One's own kernel on their system.
        ("6.18.44", "#1 SMP Debian 6.1.176-1 (2026-10-01)", "6.18.44"),
    ],
)  # fmt: skip
def test_the_patch_level_of_debian_and_ubuntu(release: str, told: str, found: str) -> None:
    assert with_patch_level(release, told) == found


@pytest.mark.unit
def test_the_running_release_has_the_patch_level() -> None:
    found = running_release()
    assert os.uname().release in found
    assert parse_release(found)[:2] == parse_release(os.uname().release)[:2]


@pytest.mark.kernel
def test_what_can_be_tried_is_tried_here() -> None:
    status, told, _ = run("-o", "json")
    report = json.loads(told)
    outcomes = {each["what"]: each["found"] for each in report["tried"]}
    assert len(outcomes) == 2
    whole, stays = outcomes.values()
    assert whole == ""
    # Every kernel that was tried keeps the entry, see docs/diagnose.md.
    assert "SOCKHOP-2" in stays
    seen = {each["fault"]: each["affected"] for each in report["faults"]}
    assert seen["SOCKHOP-2"] == "yes"
    assert status == 1


@pytest.mark.kernel
def test_without_root_it_says_what_it_could_not_try() -> None:
    done = subprocess.run(
        ["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups",
         SOCKHOP, "advisories"],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 1  # SOCKHOP-2 is suspected by version
    assert done.stdout.count("\nnot tried: ") == 2
    assert done.stderr == ""
