"""compact.schema.json and the parser accept the same documents, but for the listed rules."""

import copy
import ipaddress
import json
import re
import tempfile
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from hypothesis import HealthCheck, event, example, given, settings
from hypothesis import strategies as st

from sockhop.errors import InputError
from sockhop.model import parse_address
from sockhop.sources.files import load
from tests.sources.manifests import compact
from tests.sources.test_compact import DESIGN

pytestmark = pytest.mark.unit

SCHEMA = json.loads(
    resources.files("sockhop.sources").joinpath("compact.schema.json").read_text("utf-8")
)
BEYOND_THE_SCHEMA = (
    "expected a name of its own",
    "expected a frontend of its own",
    "expected each backend once",
    "expected whole seconds, from 1s to 1d",
    "expected no less than the time to drain",
    "expected at least 100ms",
    "expected an IPv4 or IPv6 network",
    "expected a network in",
    "expected a port from 1 to 65535 or a range",
)
"""What the schema's $comment lists; the last two of its rules are in :func:`is_beyond`."""


def ecma_pattern(_: Any, pattern: str, instance: object, __: Any) -> Iterator[Any]:
    """A regular expression as JSON Schema means it (ECMA-262): `$` is the very end."""
    if isinstance(instance, str) and not re.search(re.sub(r"\$\Z", r"\\Z", pattern), instance):
        yield jsonschema.ValidationError(f"{instance!r} does not match")


extend: Any = jsonschema.validators.extend
VALIDATOR = extend(jsonschema.Draft202012Validator, {"pattern": ecma_pattern})(SCHEMA)


def refusal_of(document: object) -> str:
    """What the parser says of a document, "" if it takes it; the same for JSON and YAML."""
    with tempfile.TemporaryDirectory() as directory:
        said = []
        for name, text in (("m.json", json.dumps(document)), ("m.yaml", yaml.dump(document))):
            path = Path(directory, name)
            path.write_text(text)
            try:
                load([path])
                said.append("")
            except InputError as error:
                said.append(str(error).removeprefix(str(path)))
        assert bool(said[0]) == bool(said[1]), said
    return said[0]


def is_unspecified(text: str) -> bool:
    host = text.rpartition(":")[0].strip("[]")
    try:
        return ipaddress.ip_address(parse_address(host)).is_unspecified
    except ValueError:
        return False


def is_beyond(said: str) -> bool:
    """Whether the parser refused for a reason that the schema cannot know."""
    found = re.search(r"found '(.*?)(/\S+)?', expected \"address:port\"", said)
    unspecified = found is not None and is_unspecified(found[1])
    fraction = re.search(r"found -?[0-9.]+(\.0|e\+[0-9]+), expected", said) is not None
    return unspecified or fraction or any(rule in said for rule in BEYOND_THE_SCHEMA)


IPV4 = st.integers(1, 2**32 - 1).map(lambda number: str(ipaddress.IPv4Address(number)))
IPV6 = (
    st.integers(1, 2**128 - 1)
    .map(ipaddress.IPv6Address)
    .flatmap(lambda a: st.sampled_from([a.compressed, a.exploded, a.compressed.upper()]))
)
MAPPED = IPV4.map(lambda a: f"::ffff:{a}")
HOSTS = IPV4 | (IPV6 | MAPPED).map(lambda a: f"[{a}]")
ENDPOINTS = st.builds("{}:{}".format, HOSTS, st.integers(1, 65535))
DURATIONS = st.builds(
    "{}{}".format, st.integers(1, 10**9 - 1), st.sampled_from(["ms", "s", "m", "h", "d"])
)
AFFINITIES = st.builds("{}s".format, st.integers(1, 86400))
NAMES = st.from_regex(r"\A[A-Za-z0-9]([A-Za-z0-9._/-]{0,9}[A-Za-z0-9])?\Z")
PATHS = st.text(
    st.characters(codec="utf-8", min_codepoint=0x21, exclude_characters="\x7f"), max_size=9
).map(lambda text: f"/{text}")


def form(required: dict[str, Any], optional: dict[str, Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries(required, optional=optional)


BACKENDS = ENDPOINTS | form(
    {"address": ENDPOINTS},
    {
        "weight": st.integers(0, 65535),
        "state": st.sampled_from(["active", "terminating", "quarantined", "maintenance"]),
    },
)
ACTIONS = st.sampled_from(["leave", "sever", "resteer"]) | form(
    {"drain": DURATIONS}, {"deadline": st.just("999999999d")}
)
TRIGGERS = form(
    {},
    dict.fromkeys(["removed", "terminating", "quarantined", "maintenance", "denied"], ACTIONS),
)
CLIENTS = form(
    {},
    {
        "namespaces": st.sampled_from(["host", "all"]) | st.lists(PATHS, min_size=1),
        "cgroups": st.lists(PATHS, max_size=2),
        "exclude": st.lists(PATHS, max_size=2),
    },
)
MODES = st.sampled_from(["auto", "on", "off", True, False])
SIZES = st.sampled_from(["1KiB", "256KiB", "9999KiB", "1MiB", "99MiB"])
PORTS = {"port": st.integers(1, 65535)}
HTTP_CHECKS = form({"path": st.from_regex(r"\A/[!-~]{0,9}\Z")}, PORTS)
HEALTH = {
    "interval": st.integers(100, 999_999).map("{}ms".format),
    "timeout": DURATIONS,
    "rise": st.integers(1, 1000),
    "fall": st.integers(1, 1000),
}
SERVICES = form(
    {
        "name": NAMES,
        "frontends": st.lists(
            st.builds("{}{}".format, ENDPOINTS, st.sampled_from(["", "/tcp", "/udp", "/tcp+udp"])),
            min_size=1,
            max_size=3,
        ),
        "backends": st.lists(BACKENDS, max_size=3),
    },
    {
        "algorithm": st.sampled_from(["random", "round-robin", "maglev", "least-connections"]),
        "fallback": st.permutations(["terminating", "quarantined", "maintenance"]).flatmap(
            lambda states: st.integers(0, 3).map(lambda count: states[:count])
        ),
        "reserve": st.booleans(),
        "sessionAffinity": form({"clientIP": form({}, {"timeout": AFFINITIES})}, {}),
        "intent": form({}, {"tcp": TRIGGERS, "udp": TRIGGERS}),
        "splice": MODES | form({"mode": MODES}, {"budget": SIZES, "leaveAfter": SIZES}),
        "health": form({"http": HTTP_CHECKS}, HEALTH) | form({"tcp": form({}, PORTS)}, HEALTH),
        "clients": CLIENTS,
    },
)
NETWORKS = st.builds(
    lambda address, length: str(ipaddress.ip_network((address, length), strict=False)),
    st.integers(0, 2**32 - 1),
    st.integers(0, 32),
) | st.builds(
    lambda address, length: str(ipaddress.ip_network((address, length), strict=False)),
    st.integers(2**64, 2**128 - 1),
    st.integers(0, 128),
)
RULES = st.lists(
    form(
        {"cidr": NETWORKS},
        {
            "except": st.just([]),
            "ports": st.lists(
                st.integers(1, 65535)
                | st.builds("{}-{}".format, st.integers(1, 9), st.integers(9, 65535)),
                min_size=1,
                max_size=3,
            ),
            "protocol": st.sampled_from(["tcp", "udp", "tcp+udp"]),
        },
    ),
    max_size=2,
)
POLICIES = form({"name": NAMES, "deny": RULES}, {"clients": CLIENTS}) | form(
    {"name": NAMES, "allow": RULES}, {"clients": CLIENTS}
)
DOCUMENTS = st.builds(
    lambda services, policies: {"version": 1, "services": services, "policies": policies},
    st.lists(SERVICES, max_size=3, unique_by=lambda service: service["name"]),
    st.lists(POLICIES, max_size=2, unique_by=lambda policy: policy["name"]),
) | st.builds(
    lambda services: {"version": 1, "services": services},
    st.lists(SERVICES, max_size=3, unique_by=lambda service: service["name"]),
)
JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-1, 2),
    st.integers(65530, 65540),
    st.sampled_from([0.5, 1.0, 2.0, 1e30, 10**30, -1]),
    st.sampled_from(["", "0", "1", "off", "tcp", "1s", "0s", "1500ms", "2d", "/", "x\n", "/a b"]),
    st.sampled_from(["0.0.0.0:1", "[::]:1", "1.2.3.4:5", "[1.2.3.4]:5", "fd00::1:5", "a:1"]),
    st.sampled_from(["1.2.3.4:5/tcp", "1.2.3.4:5/TCP", "1.2.3.4:05", "1.2.3.4:5\n", "01.2.3.4:5"]),
    st.text(max_size=3),
    st.just([]),
    st.just({}),
    st.lists(st.sampled_from(["1.2.3.4:5", "1.2.3.4:5/tcp", "/x"]), max_size=2),
    st.lists(st.sampled_from(["active", "terminating", "maintenance"]), max_size=2),
)  # fmt: skip


def spots(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value in a document but the document itself."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, item in items:
        yield (*path, key)
        if isinstance(item, (dict, list)):
            yield from spots(item, (*path, key))


@st.composite
def mutated(draw: st.DrawFn) -> Any:
    """A good document in which one thing was replaced, removed or added."""
    document = copy.deepcopy(draw(DOCUMENTS))
    *way, last = draw(st.sampled_from(list(spots(document))))
    parent: Any = document
    for step in way:
        parent = parent[step]
    action = draw(st.sampled_from(["replace", "remove", "add", "repeat"]))
    if action == "replace":
        parent[last] = draw(JUNK)
    elif action == "remove":
        del parent[last]
    elif action == "repeat" and isinstance(parent, list):
        parent.append(parent[last])
    elif isinstance(parent, dict):
        parent[
            draw(st.sampled_from(["weight", "name", "timeout", "fallback", "reserve", "x", ""]))
        ] = draw(JUNK)
    else:
        parent.insert(last, draw(JUNK))
    return document


def agree(document: object) -> None:
    said, valid = refusal_of(document), VALIDATOR.is_valid(document)
    event("taken" if not said else "refused by both" if not valid else "beyond the schema")
    if valid:
        assert not said or is_beyond(said), said
    else:
        assert said, list(VALIDATOR.iter_errors(document))


def test_the_schema_is_one() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)


def test_the_full_example_is_valid() -> None:
    assert VALIDATOR.is_valid(yaml.safe_load(DESIGN))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(DOCUMENTS)
def test_good_documents_are_taken_by_both(document: dict[str, Any]) -> None:
    assert VALIDATOR.is_valid(document)
    agree(document)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(mutated())
@example({"version": 1.0, "services": []})
@example({"version": True, "services": []})
@example(compact(name="x" * 127))
@example(compact(name="x" * 128))
@example(compact(fallback=["terminating", "terminating"]))
@example(compact(reserve=1))
@example(compact(splice=1))
@example(compact(splice=0))
@example(compact(splice={"mode": "on", "budget": "0KiB"}))
@example(compact(splice={"mode": "on", "leaveAfter": "100MiB"}))
@example(compact(health={"http": {"path": "/é"}}))
@example(compact(health={"http": {"path": "/"}, "tcp": {}}))
@example(compact(clients={"cgroups": ["/é"]}))
@example(compact(clients={"cgroups": ["/\x7f"]}))
def test_bad_documents_are_refused_by_both(document: dict[str, Any]) -> None:
    agree(document)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.text(st.sampled_from("0123456789abcF.:[]/"), max_size=24)
    | st.from_regex(SCHEMA["$defs"]["endpoint"]["pattern"], fullmatch=True)
    | st.from_regex(r"\A\[[0-9a-f:]{2,20}(1\.2\.3\.4)?\]:[0-9]{1,5}\Z")
    | st.builds(
        lambda text, at, new: text[: at % len(text)] + new + text[at % len(text) + 1 :],
        ENDPOINTS,
        st.integers(0, 60),
        st.sampled_from(["", ":", "0", "::", ".", "f", "]", "[", " ", "%"]),
    )
)
@example("[1:2:3:4:5:6:7::]:1")
@example("[::2:3:4:5:6:7:8]:1")
@example("[1:2:3:4::5:6:7:8]:1")
@example("[1:2:3:4:5:6:1.2.3.4]:1")
@example("[1:2:3:4:5::1.2.3.4]:1")
@example("[::1:2:3:4:5:1.2.3.4]:1")
@example("[::1.2.3.4]:1")
@example("[1::2::3]:1")
@example("1.2.3.4:65535")
@example("1.2.3.4:65536")
@example("1.2.3.4:10\n")
def test_endpoints(text: str) -> None:
    agree(compact(backends=[text]))
    agree(compact(frontends=[text]))
