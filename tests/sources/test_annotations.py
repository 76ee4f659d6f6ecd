"""Annotations of Kubernetes Services: what sockhop reads of them, and what is said of others."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from sockhop.model import (
    Algorithm,
    Intent,
    IntentKind,
    IntentRule,
    Protocol,
    Splice,
    SpliceLimits,
    Trigger,
)
from tests.sources.manifests import refusal, service
from tests.sources.test_kubernetes import load_objects, with_metadata

pytestmark = pytest.mark.unit

SPLICE = "one of 'off', 'on', 'auto', or YAML such as '{mode: auto, budget: 64KiB}'"


def annotated(**annotations: Any) -> dict[str, Any]:
    """A Service with annotations of sockhop.io/ and one of somebody else."""
    ours = {f"sockhop.io/{key}": value for key, value in annotations.items()}
    return with_metadata(service(), annotations={"example.com/x": ["anything"], **ours})


def test_annotations(tmp_path: Path) -> None:
    for algorithm in Algorithm:
        (found,), warnings = load_objects(tmp_path, annotated(algorithm=algorithm.value))
        assert (found.algorithm, found.reserve, warnings) == (algorithm, False, [])
    (found,), warnings = load_objects(tmp_path, annotated(reserve="true"))
    assert (found.algorithm, found.reserve, warnings) == (Algorithm.RANDOM, True, [])
    (found,), warnings = load_objects(tmp_path, annotated(reserve="false", algorithm=None))
    assert (found.algorithm, found.reserve, warnings) == (Algorithm.RANDOM, False, [])


def test_intents(tmp_path: Path) -> None:
    asked = {"intent-tcp": "removed: {drain: 5s, deadline: 1m}", "intent-udp": "{denied: leave}"}
    (found,), warnings = load_objects(tmp_path, annotated(**asked))
    assert set(found.intents) == {
        IntentRule(Protocol.TCP, Trigger.REMOVED, Intent(IntentKind.DRAIN, 5, 60)),
        IntentRule(Protocol.UDP, Trigger.DENIED, Intent(IntentKind.LEAVE)),
    }
    assert warnings == []


def test_splice(tmp_path: Path) -> None:
    for value, mode, limits in (
        ("auto", Splice.AUTO, SpliceLimits()),
        ("{mode: on, budget: 32KiB}", Splice.ON, SpliceLimits(32768)),
        ("mode: auto\nleaveAfter: 4MiB\n", Splice.AUTO, SpliceLimits(leave_after=4 << 20)),
        (None, None, SpliceLimits()),
    ):
        (found,), warnings = load_objects(tmp_path, annotated(splice=value))
        assert (found.splice, found.splice_limits, warnings) == (mode, limits, [])


def test_annotations_that_sockhop_does_not_know_are_said(tmp_path: Path) -> None:
    (found,), warnings = load_objects(tmp_path, annotated(algoritm="maglev"))
    assert found.algorithm is Algorithm.RANDOM
    assert warnings == [
        "Service test/echo: annotation 'sockhop.io/algoritm' is ignored: "
        "sockhop knows sockhop.io/algorithm, sockhop.io/reserve, sockhop.io/splice, "
        "sockhop.io/intent-tcp and sockhop.io/intent-udp"
    ]


@pytest.mark.parametrize(
    ("annotations", "said"),
    [
        (
            {"sockhop.io/algorithm": "maglv"},
            "annotations['sockhop.io/algorithm']: found 'maglv', expected one of "
            "'random', 'round-robin', 'maglev', 'least-connections'\n  did you mean 'maglev'?",
        ),
        (
            {"sockhop.io/reserve": []},
            "annotations['sockhop.io/reserve']: found an empty list, "
            "expected one of 'true', 'false'",
        ),
        (
            {"sockhop.io/reserve": True},
            "annotations['sockhop.io/reserve']: found true, "
            "expected one of 'true', 'false'\n  quote it: \"true\"",
        ),
        (
            {"sockhop.io/intent-tcp": "removed: drain"},
            "annotations['sockhop.io/intent-tcp']: found 'drain' at removed, expected one of "
            "leave, sever, resteer, {drain: DURATION, deadline: DURATION}",
        ),
        (
            {"sockhop.io/intent-tcp": "gone: leave"},
            "annotations['sockhop.io/intent-tcp']: found unknown key 'gone' at gone, expected "
            "one of removed, terminating, quarantined, maintenance, denied",
        ),
        (
            {"sockhop.io/intent-udp": "{denied: {drain: 5s, deadline: 1s}}"},
            "annotations['sockhop.io/intent-udp']: found '1s' at denied.deadline, expected "
            "no less than the time to drain, 5s",
        ),
        (
            {"sockhop.io/intent-udp": "leave"},
            "annotations['sockhop.io/intent-udp']: found 'leave', "
            "expected YAML such as 'removed: {drain: 30s}'",
        ),
        (
            {"sockhop.io/intent-udp": {"removed": "leave"}},
            "annotations['sockhop.io/intent-udp']: found a mapping, expected a string with "
            "YAML such as 'removed: {drain: 30s}'",
        ),
        (
            {"sockhop.io/splice": "atuo"},
            f"annotations['sockhop.io/splice']: found 'atuo', expected {SPLICE}"
            "\n  did you mean 'auto'?",
        ),
        (
            {"sockhop.io/splice": True},
            f"annotations['sockhop.io/splice']: found true, expected {SPLICE}"
            '\n  quote it: "true"',
        ),
        (
            {"sockhop.io/splice": "{mode: on, budget: 64K}"},
            "annotations['sockhop.io/splice']: found '64K' at budget, "
            'expected a size from "1KiB" to "99MiB", such as "256KiB"',
        ),
        ({1: "x"}, "annotations: found the key 1, expected a string\n  keys too need quotes"),
        (["x"], "annotations: found a list of 1, expected a mapping"),
    ],
)
def test_what_is_refused(tmp_path: Path, annotations: Any, said: str) -> None:
    text = yaml.dump(with_metadata(service(), annotations=annotations))
    where, _, rest = refusal(tmp_path, text).partition(": metadata.")
    assert where in ("m.yaml:4", "m.yaml:5")
    assert rest == said
