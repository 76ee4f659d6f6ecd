"""The compact form: what it means, and what is said where it is wrong."""

import json
from pathlib import Path
from typing import Any

import pytest

from sockhop.model import (
    Algorithm,
    Backend,
    BackendState,
    Clients,
    Frontend,
    HealthCheck,
    Intent,
    IntentKind,
    IntentRule,
    Protocol,
    Service,
    Splice,
    SpliceLimits,
    Trigger,
    intent_for,
)
from tests.sources.manifests import compact, load_text, refusal

pytestmark = pytest.mark.unit

DESIGN = """\
version: 1
services:
  - name: web
    frontends: ["127.96.0.1:80/tcp"]
    backends: ["127.0.0.1:8080", {address: "127.0.0.1:8081", weight: 2, state: active}]
  - name: dns
    frontends: ["10.0.0.10:53/tcp+udp", "[fd00::10]:53/udp"]
    backends: ["10.1.0.2:53", "10.1.0.3:53"]
    algorithm: maglev                  # random | round-robin | maglev | least-connections
    sessionAffinity: {clientIP: {timeout: 3h}}
    intent: {tcp: {removed: {drain: 30s}}, udp: {removed: resteer}}
    splice: auto                       # off unless asked for
    health: {http: {path: /health}, interval: 5s, rise: 2, fall: 3}
"""

SPLICE = "one of auto, on, off, {mode: MODE, budget: SIZE, leaveAfter: SIZE}"


def one(tmp_path: Path, **fields: Any) -> Service:
    (found,) = load_text(tmp_path, json.dumps(compact(**fields)), "m.json").desired.services
    return found


def wrong(tmp_path: Path, **fields: Any) -> str:
    """The refusal, the same from JSON and from YAML."""
    text = json.dumps(compact(**fields))
    said = refusal(tmp_path, text, "m.json")
    assert refusal(tmp_path, text, "m.yaml") == said.replace("m.json", "m.yaml")
    return said.removeprefix("m.json:1: services[0].")


def test_the_full_example(tmp_path: Path) -> None:
    loaded = load_text(tmp_path, DESIGN)
    dns_backends = (Backend("10.1.0.2", 53), Backend("10.1.0.3", 53))
    assert loaded.desired.services == (
        Service(
            "dns",
            (
                Frontend("10.0.0.10", 53, Protocol.TCP, backends=dns_backends),
                Frontend("10.0.0.10", 53, Protocol.UDP, backends=dns_backends),
                Frontend("fd00::10", 53, Protocol.UDP, backends=dns_backends),
            ),
            Algorithm.MAGLEV,
            10800,
            intents=(
                IntentRule(Protocol.TCP, Trigger.REMOVED, Intent(IntentKind.DRAIN, 30.0)),
                IntentRule(Protocol.UDP, Trigger.REMOVED, Intent(IntentKind.RESTEER)),
            ),
            splice=Splice.AUTO,
            health=HealthCheck("/health"),
        ),
        Service(
            "web",
            (
                Frontend(
                    "127.96.0.1",
                    80,
                    Protocol.TCP,
                    backends=(
                        Backend("127.0.0.1", 8080),
                        Backend("127.0.0.1", 8081, BackendState.ACTIVE, 2),
                    ),
                ),
            ),
        ),
    )
    assert not loaded.warnings


def test_no_services_and_no_backends(tmp_path: Path) -> None:
    assert load_text(tmp_path, "version: 1\nservices: []\n").desired.services == ()
    assert one(tmp_path, backends=[]).frontends[0].backends == ()


def test_families(tmp_path: Path) -> None:
    both = ["10.1.0.1:1", "[fd00::1]:1"]
    found = one(tmp_path, frontends=["10.0.0.1:80", "[fd00::2]:80"], backends=both)
    assert [[b.address for b in f.backends] for f in found.frontends] == [["10.1.0.1"], ["fd00::1"]]
    mapped = one(tmp_path, frontends=["[fd00::2]:80"])
    assert [b.address for b in mapped.frontends[0].backends] == ["10.1.0.1"]


def test_a_frontend_left_without_backends_is_said(tmp_path: Path) -> None:
    text = json.dumps(compact(backends=["[fd00::1]:1"]))
    loaded = load_text(tmp_path, text, "m.json")
    assert loaded.desired.services[0].frontends[0].backends == ()
    assert loaded.warnings == (
        f"{tmp_path}/m.json: service web: frontend 10.0.0.1:80/tcp has no backend: "
        "IPv6 ones cannot serve an IPv4 frontend",
    )


def test_addresses_become_canonical(tmp_path: Path) -> None:
    frontends = ["[FD00:0:0::0001]:80", "[::ffff:10.0.0.9]:80/udp"]
    found = one(tmp_path, frontends=frontends)
    assert [str(f) for f in found.frontends] == ["[fd00::1]:80/tcp", "10.0.0.9:80/udp"]


@pytest.mark.parametrize(
    ("timeout", "seconds"),
    [("1s", 1), ("2000ms", 2), ("5m", 300), ("3h", 10800), ("1d", 86400)],
)
def test_affinity(tmp_path: Path, timeout: str, seconds: int) -> None:
    found = one(tmp_path, sessionAffinity={"clientIP": {"timeout": timeout}})
    assert found.affinity_seconds == seconds


def test_affinity_without_a_time_is_three_hours(tmp_path: Path) -> None:
    assert one(tmp_path, sessionAffinity={"clientIP": {}}).affinity_seconds == 10800


def test_fallback(tmp_path: Path) -> None:
    terminating, quarantined = BackendState.TERMINATING, BackendState.QUARANTINED
    assert one(tmp_path).fallback == (terminating,)
    assert one(tmp_path, fallback=[]).fallback == ()
    states = ["quarantined", "maintenance", "terminating"]
    found = one(tmp_path, fallback=states).fallback
    assert found == (quarantined, BackendState.MAINTENANCE, terminating)


def test_reserve(tmp_path: Path) -> None:
    assert one(tmp_path).reserve is False
    assert one(tmp_path, reserve=True).reserve is True


@pytest.mark.parametrize(
    ("clients", "found"),
    [
        ({}, Clients()),
        ({"namespaces": "host"}, Clients("host")),
        ({"namespaces": "all", "cgroups": [], "exclude": []}, Clients("all")),
        ({"namespaces": ["/run/netns/a", "/b"]}, Clients(("/run/netns/a", "/b"))),
        ({"cgroups": ["/a"], "exclude": ["/a/b", "/c"]}, Clients(None, ("/a",), ("/a/b", "/c"))),
    ],
)
def test_clients(tmp_path: Path, clients: dict[str, Any], found: Clients) -> None:
    loaded = load_text(tmp_path, json.dumps(compact(clients=clients)))
    assert loaded.desired.services[0].clients == found
    assert not loaded.warnings


def test_clients_that_are_not_limited(tmp_path: Path) -> None:
    assert one(tmp_path).clients is None


def test_the_message_of_the_brief(tmp_path: Path) -> None:
    text = (
        "version: 1\nservices: []\n---\nversion: 1\nservices:\n  - name: web\n"
        "    frontends: ['10.0.0.1:80']\n    backends:\n"
        "      - 127.0.0.1:8080\n      - 127.0.0.1:80800\n"
    )
    assert refusal(tmp_path, text) == (
        "m.yaml:10: document 2: services[0].backends[1]: found '127.0.0.1:80800', "
        'expected "address:port" with a port from 1 to 65535'
    )


@pytest.mark.parametrize(
    "text",
    [
        "", ":", "10.0.0.1", "10.0.0.1:", ":80", "10.0.0.1:0", "10.0.0.1:080", "10.0.0.1:65536",
        "10.0.0.1:-1", "10.0.0.1:+8", "10.0.0.1: 8", "10.0.0.1:8 ", "10.0.0.1:8\n", "10.0.0.1:٨",
        "10.0.0.1:8²", "10.0.0:80", "010.0.0.1:80", "localhost:80", "0.0.0.0:80", "[::]:80",
        "[::ffff:0.0.0.0]:80", "[10.0.0.1]:80", "[fd00::1:80", "fd00::1]:80", "[]:80", "[:80",
        "[fe80::1%eth0]:80", "10.0.0.1\x00:80", "fd00::1:80", "[fd00::1]80", "[fd00::1]", "é:80",
    ],
)  # fmt: skip
def test_what_is_no_endpoint(tmp_path: Path, text: str) -> None:
    expected = '"address:port" with a port from 1 to 65535'
    for name in ("m.json", "m.yaml"):
        said = refusal(tmp_path, json.dumps(compact(backends=[text])), name)
        assert f"{name}:1: services[0].backends[0]: found {text!r}, expected {expected}" in said
        said = refusal(tmp_path, json.dumps(compact(backends=[{"address": text}])), name)
        assert f"services[0].backends[0].address: found {text!r}, expected {expected}" in said
        said = refusal(tmp_path, json.dumps(compact(frontends=[text])), name)
        assert f"services[0].frontends[0]: found {text!r}, expected {expected}, then" in said


@pytest.mark.parametrize("suffix", ["/", "/TCP", "/sctp", "/udp+tcp", "/tcp/", "/tcp+", " /tcp"])
def test_what_is_no_protocol(tmp_path: Path, suffix: str) -> None:
    text = f"10.0.0.1:80{suffix}"
    assert wrong(tmp_path, frontends=[text]) == (
        f'frontends[0]: found {text!r}, expected "address:port" with a port from 1 to 65535, '
        "then nothing or one of /tcp, /udp, /tcp+udp"
    )


def test_an_ipv6_address_without_brackets_gets_a_hint(tmp_path: Path) -> None:
    said = wrong(tmp_path, backends=["fd00::1:80"])
    assert said.endswith('\n  an IPv6 address stands in brackets: "[fd00::10]:53"')


ACTIONS = "one of leave, sever, resteer, {drain: DURATION, deadline: DURATION}"
DURATION = 'a duration such as "500ms", "30s", "5m", "3h" or "1d"'


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"name": ""}, "name: found '', expected a name of 1 to 127 letters"),
        ({"name": "a b"}, "name: found 'a b', expected a name of 1 to 127 letters"),
        ({"name": "web\n"}, "name: found 'web\\n', expected a name of 1 to 127 letters"),
        ({"name": "x" * 128}, "name: found 'xxxxx"),
        ({"name": None}, "name: found null, expected a name of 1"),
        ({"frontends": []}, "frontends: found an empty list, expected a list of one or more of"),
        ({"frontends": "x"}, "frontends: found 'x', expected a list of one or more of"),
        ({"backends": None}, "backends: found null, expected a list of up to 65535 backends"),
        ({"backends": {}}, "backends: found an empty mapping, expected a list of up to 65535"),
        (
            {"backends": [[]]},
            'backends[0]: found an empty list, expected "address:port" or {address, weight, state}',
        ),
        (
            {"backends": ["1.2.3.4:5", "[::ffff:1.2.3.4]:5"]},
            "backends[1]: found 1.2.3.4:5 again (as in backends[0]), expected each backend once",
        ),
        (
            {"backends": [{"address": "1.2.3.4:5", "weight": 65536}]},
            "backends[0].weight: found 65536, expected a whole number from 0 to 65535",
        ),
        (
            {"backends": [{"address": "1.2.3.4:5", "weight": 1.5}]},
            "backends[0].weight: found 1.5, expected a whole number from 0 to 65535",
        ),
        (
            {"backends": [{"address": "1.2.3.4:5", "weight": True}]},
            "backends[0].weight: found true, expected a whole number",
        ),
        (
            {"backends": [{"address": "1.2.3.4:5", "weight": 10**50}]},
            "backends[0].weight: found a huge number, expected a whole number",
        ),
        (
            {"backends": [{"address": "1.2.3.4:5", "state": "activ"}]},
            "backends[0].state: found 'activ', expected one of active, terminating, quarantined, "
            "maintenance\n  did you mean 'active'?",
        ),
        (
            {"backends": [{"address": "1.2.3.4:5", "wieght": 1}]},
            "backends[0].wieght: found unknown key 'wieght', "
            "expected one of address, weight, state\n  did you mean 'weight'?",
        ),
        (
            {"backends": [{"weight": 1}]},
            "backends[0].address: found nothing, expected a string",
        ),
        (
            {"algorithm": "round_robin"},
            "algorithm: found 'round_robin', expected one of random, round-robin, maglev, "
            "least-connections\n  did you mean 'round-robin'?",
        ),
        ({"sessionAffinity": {}}, "sessionAffinity.clientIP: found nothing, expected a mapping"),
        (
            {"sessionAffinity": {"clientIP": {"timeout": "1w"}}},
            f"sessionAffinity.clientIP.timeout: found '1w', expected {DURATION}",
        ),
        (
            {"sessionAffinity": {"clientIP": {"timeout": "1500ms"}}},
            "sessionAffinity.clientIP.timeout: found '1500ms', "
            "expected whole seconds, from 1s to 1d",
        ),
        (
            {"sessionAffinity": {"clientIP": {"timeout": "25h"}}},
            "sessionAffinity.clientIP.timeout: found '25h', expected whole seconds, from 1s to 1d",
        ),
        (
            {"fallback": "terminating"},
            "fallback: found 'terminating', expected a list of terminating, quarantined, "
            "maintenance",
        ),
        (
            {"fallback": ["active"]},
            "fallback[0]: found 'active', expected one of terminating, quarantined, maintenance",
        ),
        (
            {"fallback": ["terminatin"]},
            "fallback[0]: found 'terminatin', expected one of terminating, quarantined, "
            "maintenance\n  did you mean 'terminating'?",
        ),
        (
            {"fallback": ["terminating", "maintenance", "terminating"]},
            "fallback[2]: found terminating again (as in fallback[0]), expected each state once",
        ),
        ({"fallback": None}, "fallback: found null, expected a list of terminating, quarantined"),
        ({"reserve": "yes"}, "reserve: found 'yes', expected true or false"),
        ({"reserve": 1}, "reserve: found 1, expected true or false"),
        (
            {"intent": {"tcp": {"removed": "drain"}}},
            f"intent.tcp.removed: found 'drain', expected {ACTIONS}",
        ),
        (
            {"intent": {"tcp": {"removed": {"drain": "0s"}}}},
            f"intent.tcp.removed.drain: found '0s', expected {DURATION}",
        ),
        (
            {"intent": {"udp": {"denied": {"drain": "5m", "deadline": "1m"}}}},
            "intent.udp.denied.deadline: found '1m', expected no less than the time to drain, 5m",
        ),
        (
            {"intent": {"sctp": {}}},
            "intent.sctp: found unknown key 'sctp', expected one of tcp, udp",
        ),
        ({"splice": "yes"}, f"splice: found 'yes', expected {SPLICE}"),
        ({"splice": 1}, f"splice: found 1, expected {SPLICE}"),
        ({"splice": {}}, "splice.mode: found nothing, expected one of auto, on, off"),
        (
            {"splice": {"mode": "on", "budget": "1GiB"}},
            "splice.budget: found '1GiB', "
            'expected a size from "1KiB" to "99MiB", such as "256KiB"',
        ),
        ({"health": {}}, "health: found none of http and tcp, expected one of http, tcp"),
        (
            {"health": {"tcp": {}, "http": {"path": "/"}}},
            "health: found http and tcp, expected one of http, tcp",
        ),
        (
            {"health": {"tcp": {"port": 0}}},
            "health.tcp.port: found 0, expected a port from 1 to 65535",
        ),
        (
            {"health": {"tcp": {}, "interval": "99ms"}},
            "health.interval: found '99ms', expected at least 100ms",
        ),
        (
            {"health": {"http": {"path": "health"}}},
            "health.http.path: found 'health', expected an HTTP path such as \"/health\"",
        ),
        (
            {"health": {"http": {"path": "/"}, "rise": 0}},
            "health.rise: found 0, expected a whole number from 1 to 1000",
        ),
        (
            {"clients": {"namespaces": []}},
            "clients.namespaces: found an empty list, expected host, all or a list of one or more",
        ),
        (
            {"clients": {"cgroups": ["system.slice"]}},
            "clients.cgroups[0]: found 'system.slice', expected a path that begins with \"/\"",
        ),
    ],
)  # fmt: skip
def test_what_is_refused(tmp_path: Path, fields: dict[str, Any], said: str) -> None:
    assert wrong(tmp_path, **fields).startswith(said)


@pytest.mark.parametrize(
    ("document", "said"),
    [
        ({"version": 1}, "services: found nothing, expected a list"),
        ({"services": []}, "version: found nothing, expected 1"),
        ({"version": 2, "services": []}, "version: found 2, expected 1"),
        ({"version": "1", "services": []}, "version: found '1', expected 1"),
        ({"version": True, "services": []}, "version: found true, expected 1"),
        ({"version": 1, "service": []}, "service: found unknown key 'service', "
         "expected one of version, services, policies\n  did you mean 'services'?"),
        ({"version": 1, "services": None}, "services: found null, expected a list"),
        ({"version": 1, "services": [1]}, "services[0]: found 1, expected a mapping"),
        ([], "found an empty list, expected a mapping"),
        ("services", "found 'services', expected a mapping"),
    ],
)  # fmt: skip
def test_what_is_no_compact_document(tmp_path: Path, document: object, said: str) -> None:
    for name in ("m.json", "m.yaml"):
        assert refusal(tmp_path, json.dumps(document), name) == f"{name}:1: {said}"


@pytest.mark.parametrize("value", ["80", "yes", "on", "1.5", "0x10", "1:20", "TRUE"])
def test_yaml_that_is_no_string_asks_for_quotes(tmp_path: Path, value: str) -> None:
    text = f"version: 1\nservices:\n- frontends: ['10.0.0.1:80']\n  backends: []\n  name: {value}\n"
    said = refusal(tmp_path, text)
    assert said.startswith("m.yaml:5: services[0].name: found ")
    assert said.endswith(f'\n  quote it: "{value}"')
    quoted = text.replace(f"name: {value}", "name: 'web'")
    assert load_text(tmp_path, quoted).desired.services[0].name == "web"


def test_splice_takes_yaml_booleans(tmp_path: Path) -> None:
    for value in ("off", "'off'", "on", "'on'", "auto"):
        text = (
            "version: 1\nservices:\n- name: web\n  frontends: ['10.0.0.1:80']\n"
            f"  backends: []\n  splice: {value}\n"
        )
        loaded = load_text(tmp_path, text)
        assert loaded.desired.services[0].splice == value.strip("'")
        assert not loaded.warnings


def test_limits_of_splicing(tmp_path: Path) -> None:
    said = one(tmp_path, splice={"mode": "on", "budget": "64KiB"})
    assert (said.splice, said.splice_limits) == (Splice.ON, SpliceLimits(65536))
    said = one(tmp_path, splice={"mode": False, "leaveAfter": "2MiB"})
    assert (said.splice, said.splice_limits) == (Splice.OFF, SpliceLimits(leave_after=2 << 20))


def test_health(tmp_path: Path) -> None:
    assert one(tmp_path, health={"http": {"path": "/up"}}).health == HealthCheck("/up")
    said = {"tcp": {"port": 81}, "interval": "2m", "timeout": "500ms", "rise": 1, "fall": 9}
    assert one(tmp_path, health=said).health == HealthCheck("", 81, 120.0, 0.5, 1, 9)
    assert one(tmp_path).health is None


def test_intents(tmp_path: Path) -> None:
    said = one(
        tmp_path,
        intent={
            "tcp": {"removed": {"drain": "1500ms", "deadline": "5m"}, "terminating": "resteer"},
            "udp": {"quarantined": "sever", "denied": "leave"},
        },
    )
    silent = one(tmp_path)
    tcp, udp = Protocol.TCP, Protocol.UDP
    for protocol, trigger, expected in (
        (tcp, Trigger.REMOVED, Intent(IntentKind.DRAIN, 1.5, 300.0)),
        (tcp, Trigger.TERMINATING, Intent(IntentKind.SEVER)),
        (udp, Trigger.QUARANTINED, Intent(IntentKind.SEVER)),
        (udp, Trigger.DENIED, Intent(IntentKind.LEAVE)),
    ):
        assert intent_for(said.intents, protocol, trigger) == expected
    assert intent_for(said.intents, udp, Trigger.REMOVED) == Intent(IntentKind.RESTEER)
    assert intent_for(said.intents, tcp, Trigger.DENIED) == Intent(IntentKind.SEVER)
    assert intent_for(silent.intents, tcp, Trigger.REMOVED) == Intent(IntentKind.DRAIN, 30.0)
    assert str(intent_for(said.intents, tcp, Trigger.REMOVED)) == "drain 1.5s, deadline 300s"
    assert str(intent_for(silent.intents, udp, Trigger.MAINTENANCE)) == "leave"


def test_too_many_backends(tmp_path: Path) -> None:
    backends = [f"10.{n >> 16}.{(n >> 8) & 255}.{n & 255}:1" for n in range(1, 65537)]
    assert "found a list of 65536, expected a list of up to 65535" in wrong(
        tmp_path, backends=backends
    )
    assert len(one(tmp_path, backends=backends[:65535]).frontends[0].backends) == 65535


@pytest.mark.parametrize(
    "field", ["health: {tcp: {}, interval: 5}", "intent: {tcp: {removed: {drain: 30}}}"]
)
def test_what_quotes_would_not_mend_asks_for_none(tmp_path: Path, field: str) -> None:
    service = "name: a\n  frontends: ['10.0.0.1:80']\n  backends: []"
    text = f"version: 1\nservices:\n- {service}\n  {field}\n"
    said = refusal(tmp_path, text)
    assert said.endswith('expected a duration such as "500ms", "30s", "5m", "3h" or "1d"')
