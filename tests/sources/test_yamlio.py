"""YAML's values, and the bounds that keep a file from taking the machine."""

import resource
import subprocess
import sys
import time
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sockhop.sources.yamlio import YamlError, load_all, locate

pytestmark = pytest.mark.unit

SCALARS = st.none() | st.booleans() | st.integers() | st.text(max_size=20) | st.floats(
    allow_nan=False, allow_infinity=False
)  # fmt: skip
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner),
    max_leaves=20,
)


def problem(text: str) -> tuple[int, str]:
    with pytest.raises(YamlError) as caught:
        load_all(text.encode())
    return caught.value.line, caught.value.problem


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(VALUES, max_size=3), st.booleans())
def test_what_pyyaml_writes_is_read_as_pyyaml_reads_it(values: list[Any], flow: bool) -> None:
    text = yaml.safe_dump_all(values, default_flow_style=flow)
    assert load_all(text.encode()) == list(yaml.safe_load_all(text)) == values


@pytest.mark.parametrize(
    "text",
    [
        "a", "", "~", "null", "yes", "No", "on", "0", "017", "0x1F", "0b11", "1_000", "+5", "1:30",
        "1.5", "1e3", "1.0e+3", ".inf", "-.INF", "'5'", '"yes"', "!!str 5", "!!int '5'", "! 5",
        "!!float 5", "!!bool yes", "!!null ''", "!!seq [1]", "!!map {a: 1}", "|\n a\n b\n",
        "{a: &x 1, b: *x}", "{a: &x [1, {b: 2}], b: *x}",
        "{<<: {a: 1, b: 2}, a: 3}", "{<<: [{a: 1}, {a: 2, b: 3}], c: 4}",
        "{a: {<<: &m {x: 1}}, b: *m}", "{1: a, ~: c}", "? a\n: b\n? c\n",
    ],
)  # fmt: skip
def test_values_are_those_of_pyyaml(text: str) -> None:
    assert load_all(text.encode()) == list(yaml.safe_load_all(text))


def test_what_pyyaml_refuses_and_yaml_allows() -> None:
    assert load_all(b"[&x a, *x, &x b, *x]") == [["a", "a", "b", "b"]]
    assert load_all(b"[<<, &x <<, *x, {a: <<}]") == [["<<", "<<", "<<", {"a": "<<"}]]


def test_times_stay_strings() -> None:
    assert load_all(b"[2024-01-01, 2024-01-01T00:00:00Z, 2024-99-99]") == [
        ["2024-01-01", "2024-01-01T00:00:00Z", "2024-99-99"]
    ]


def test_a_number_of_many_digits_is_a_string() -> None:
    assert load_all(b"9" * 5000) == ["9" * 5000]


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        ("a: 1\nb: 2\na: 3\n", 3, "duplicate key 'a'"),
        ("x:\n  a: 1\n  'a': 3\n", 3, "duplicate key 'a'"),
        ("{1: a,\n 0x1: b}", 2, "duplicate key 1"),
        ("<<: {a: 1}\n<<: {b: 1}\n", 2, "duplicate key <<"),
        ("a: *x\n", 1, "unknown or recursive alias *x"),
        ("a: &x\n  b: *x\n", 2, "unknown or recursive alias *x"),
        ("&x [1]\n---\n*x\n", 3, "unknown or recursive alias *x"),
        ("? [a]\n: b\n", 1, "a key cannot be a list or a mapping"),
        ("? {a: 1}\n: b\n", 1, "a key cannot be a list or a mapping"),
        ("<<: 5\n", 1, "a merge key (<<) takes a mapping or a list of mappings"),
        ("<<: [{}, 5]\n", 1, "a merge key (<<) takes a mapping or a list of mappings"),
        ("a: !!python/object:os.system x\n", 1, "unknown tag 'tag:yaml.org,2002:python/object"),
        ("a: !x 5\n", 1, "unknown tag '!x'"),
        ("a: !!set {b}\n", 1, "unknown tag"),
        ("a: !!int x\n", 1, "'x' is not of the type int"),
        ("a: !!int ''\n", 1, "'' is not of the type int"),
        ("a: !!bool x\n", 1, "'x' is not of the type bool"),
        ("a: !!float x\n", 1, "'x' is not of the type float"),
        ("a:\n\tb: 1\n", 2, "found character that cannot start any token"),
        ("a: b: c\n", 1, "mapping values are not allowed in this context"),
        ("a: [1\n", 2, "did not find expected ',' or ']'"),
        ("\n\na: \x01\n", 3, "control characters are not allowed"),
        ("%YAML 9.9\n---\na\n", 1, "found incompatible YAML document"),
    ],
)
def test_what_is_refused(text: str, line: int, said: str) -> None:
    found_line, found = problem(text)
    assert found_line == line
    assert found.startswith(said)


NESTED = {
    "lists": "[" * 100_000,
    "mappings": "{a: " * 100_000,
    "dashes": "- " * 100_000,
    "keys": "? " * 100_000,
    "indents": "\n".join(" " * n + "a:" for n in range(1000)),
    "mixed": "- ? " * 50_000,
}


@pytest.mark.parametrize("name", NESTED)
def test_deep_nesting_ends_soon(name: str) -> None:
    began = time.monotonic()
    assert problem(NESTED[name])[1] == "nested more than 100 deep"
    assert time.monotonic() - began < 2


def test_nesting_up_to_the_bound() -> None:
    assert load_all(b"[" * 100 + b"]" * 100)
    assert problem("[" * 101 + "]" * 101)[1] == "nested more than 100 deep"


LIST_OF_TEN = "a{n}: &a{n} [" + ", ".join(["*a{m}"] * 10) + "]\n"
MAPPING_OF_TEN = "a{n}: &a{n} {{" + ", ".join(f"k{k}: *a{{m}}" for k in range(10)) + "}}\n"
BOMBS = {
    "lists": "a0: &a0 [x]\n"
    + "".join(LIST_OF_TEN.format(n=n, m=n - 1) for n in range(1, 20)),
    "mappings": "a0: &a0 {x: y}\n"
    + "".join(MAPPING_OF_TEN.format(n=n, m=n - 1) for n in range(1, 20)),
    "merges": "a: &a {" + ", ".join(f"k{n}: 1" for n in range(2000)) + "}\n"
    + "b: {<<: [" + ", ".join(["*a"] * 2000) + "]}\n",
}  # fmt: skip


@pytest.mark.parametrize("name", BOMBS)
def test_alias_bombs_are_refused_in_little_memory(name: str) -> None:
    script = (
        "import sys; from sockhop.sources.yamlio import YamlError, load_all\n"
        "try: load_all(sys.stdin.buffer.read())\n"
        "except YamlError as error: print(error.problem)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        input=BOMBS[name],
        capture_output=True,
        text=True,
        check=True,
        timeout=20,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30)),
    )
    assert done.stdout == "aliases stand for more than 1,000,000 values\n"


@pytest.mark.parametrize(
    ("path", "line", "text"),
    [
        ((), 3, None),
        (("a",), 3, "1"),
        (("list",), 4, None),
        (("list", 0), 5, "x"),
        (("list", 1, "b"), 6, "on"),
        (("list", 1, "c", 1), 8, "z"),
        (("list", 2), 9, "last"),
        (("list", 9), 4, None),
        (("list", 1, "nothing"), 6, None),
        (("nothing", "below"), 3, None),
        (("a", "below"), 3, None),
    ],
)
def test_locate(path: tuple[str | int, ...], line: int, text: str | None) -> None:
    data = b"other\n---\na: 1\nlist:\n- x\n- b: on\n  c: [y,\n    z]\n- last\n"
    assert locate(data, 2, path) == (line, text)


def test_locate_in_what_is_no_yaml() -> None:
    assert locate(b"a: [", 1, ("a", 5)) == (0, None)
    assert locate(b"a: 1", 2, ("a",)) == (0, None)
