"""2,000 manifests, half of them with up to three faults: a result or a clear error."""

import copy
import json
import os
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from sockhop.errors import InputError
from sockhop.sources.files import Loaded, load

pytestmark = pytest.mark.unit

COUNT = 2000
JUNK: list[Any] = [
    None, True, False, 0, -1, 1.5, 80, 70000, 10**30, "", "x", "None", "10.0.0.1", "fd00::1",
    "1.2.3.4:5", "10.0.0.1:99999", [], {}, [[]], [None], {"x": 1}, "é\u2028", "a\nb", "\x07",
    "0.0.0.0:1", "TCP", "SCTP", "2024-01-01T00:00:00Z", "v1", "List", "x" * 300,
]  # fmt: skip
TOKENS = [
    "*x", "&x ", "!!binary ", "!!int ", "!x ", "<<: ", "\t", "{", "}", "[", "]", ":", " : ", "- ",
    "? ", "| ", "> ", "'", '"', "#", "---\n", "...\n", "%YAML 1.1\n", "\n", ",", "\\", "~", "0x",
    "1:2", "yes", "=", "null", "\ufeff", "\u0085", "- " * 200, "[" * 200, "{a: " * 200,
]  # fmt: skip


class Generator:
    """Good documents, from a seed."""

    def __init__(self, chance: random.Random) -> None:
        self._chance = chance
        self._number = 0

    def documents(self) -> list[Any]:
        """Documents for one file; names and addresses differ."""
        self._number = 0
        kinds: list[Callable[[], list[Any]]] = [self._compact, self._kubernetes, self._list]
        return [d for _ in range(self._chance.randint(1, 2)) for d in self._chance.choice(kinds)()]

    def _next(self) -> int:
        self._number += 1
        return self._number

    def _some(self, **optional: Any) -> dict[str, Any]:
        return {key: value for key, value in optional.items() if self._chance.random() < 0.4}

    def _address(self) -> str:
        number = self._next()
        return self._chance.choice([f"10.0.{number >> 8}.{number & 255}", f"fd00::{number:x}"])

    def _endpoint(self) -> str:
        address = self._address()
        host = f"[{address}]" if ":" in address else address
        return f"{host}:{self._chance.randint(1, 65535)}"

    def _compact(self) -> list[Any]:
        services = [self._compact_service() for _ in range(self._chance.randint(0, 3))]
        return [{"version": 1, "services": services}]

    def _compact_service(self) -> dict[str, Any]:
        protocols = ["", "/tcp", "/udp", "/tcp+udp"]
        count = self._chance.randint
        return {
            "name": f"web-{self._next()}",
            "frontends": [
                self._endpoint() + self._chance.choice(protocols) for _ in range(count(1, 3))
            ],
            "backends": [
                self._endpoint()
                if self._chance.random() < 0.5
                else {"address": self._endpoint(), **self._some(weight=count(0, 9), state="active")}
                for _ in range(count(0, 4))
            ],
            **self._some(
                algorithm=self._chance.choice(["random", "maglev"]),
                fallback=["quarantined", "terminating"],
                reserve=True,
                sessionAffinity={"clientIP": {"timeout": "3h"}},
                intent={"tcp": {"removed": {"drain": "30s"}}, "udp": {"removed": "resteer"}},
                splice="auto",
                health={"http": {"path": "/health"}, "interval": "5s", "rise": 2},
                clients={"namespaces": ["/run/netns/a"]},
            ),
        }

    def _kubernetes(self) -> list[Any]:
        name = f"echo-{self._next()}"
        kind = self._chance.choice(["Service", "Service", "ExternalName", "Pod"])
        if kind == "Pod":
            return [{"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}}]
        ports: list[dict[str, Any]] = [
            {"name": f"p{n}", "port": 80 + n, **self._some(protocol="UDP", nodePort=30000)}
            for n in range(self._chance.randint(1, 2))
        ]
        spec = {"clusterIP": self._address(), "ports": ports, **self._some(
            type="LoadBalancer", externalIPs=[self._address()], sessionAffinity="ClientIP",
            internalTrafficPolicy="Local", sessionAffinityConfig={"clientIP": {}},
        )}  # fmt: skip
        if kind == "ExternalName":
            spec = {"type": "ExternalName", "externalName": "x.example"}
        metadata = {
            "name": name,
            **self._some(namespace="test", annotations={"a": "b", "sockhop.io/reserve": "true"}),
        }
        objects: list[Any] = [
            {"apiVersion": "v1", "kind": "Service", "metadata": metadata, "spec": spec}
        ]
        for number in range(self._chance.randint(0, 2)):
            objects.append(self._slice(f"{name}-{number}", metadata, ports))
        return objects

    def _slice(self, name: str, owner: dict[str, Any], ports: list[Any]) -> dict[str, Any]:
        family = self._chance.choice(["IPv4", "IPv6"])
        prefix = "10.9.0." if family == "IPv4" else "fd09::"
        return {
            "apiVersion": "discovery.k8s.io/v1",
            "kind": "EndpointSlice",
            "metadata": {
                **owner,
                "name": name,
                "labels": {"kubernetes.io/service-name": owner["name"]},
            },
            "addressType": family,
            "endpoints": [
                {
                    "addresses": [f"{prefix}{number + 1}"],
                    **self._some(conditions={"ready": self._chance.random() < 0.7}, nodeName="a"),
                }
                for number in range(self._chance.randint(0, 4))
            ],
            "ports": [{k: v for k, v in port.items() if k != "nodePort"} for port in ports],
        }

    def _list(self) -> list[Any]:
        return [{"apiVersion": "v1", "kind": "List", "items": self._kubernetes()}]


def write(documents: list[Any], chance: random.Random) -> tuple[str, str]:
    """Return a file's name and text: JSON if that can hold the documents, else YAML."""
    if len(documents) == 1 and chance.random() < 0.5:
        return "m.json", json.dumps(documents[0], indent=chance.choice([None, 1, 4]))
    flow = chance.choice([None, False, True])
    return "m.yaml", yaml.safe_dump_all(documents, default_flow_style=flow, sort_keys=False)


def parents(value: Any) -> list[Any]:
    """Every mapping and list that has something in it."""
    if not value or not isinstance(value, (dict, list)):
        return []
    items = value.values() if isinstance(value, dict) else value
    return [value, *(found for item in items for found in parents(item))]


def break_structure(documents: list[Any], chance: random.Random) -> None:
    parent = chance.choice(parents(documents))
    key = chance.choice(list(parent) if isinstance(parent, dict) else range(len(parent)))
    action = chance.randrange(5)
    if action == 0:
        del parent[key]
    elif action == 1:
        parent[key] = [parent[key]]
    elif action == 2 and isinstance(parent, list):
        parent.append(copy.deepcopy(parent[key]))
    elif action == 3 and isinstance(parent, dict):
        parent[f"{key}x"[chance.randrange(2) :]] = parent.pop(key)
    else:
        parent[key] = copy.deepcopy(chance.choice(JUNK))


def break_text(text: str, chance: random.Random) -> str:
    lines = text.splitlines(keepends=True) or [""]
    at = chance.randrange(len(lines))
    action = chance.randrange(5)
    if action == 0:
        del lines[at]
    elif action == 1:
        lines.insert(at, lines[chance.randrange(len(lines))])
    elif action == 2:
        lines[at] = " " + lines[at]
    elif action == 3:
        lines[at] = lines[at].removeprefix(" ")
    else:
        place = chance.randint(0, len(lines[at]))
        lines[at] = lines[at][:place] + chance.choice(TOKENS) + lines[at][place:]
    return "".join(lines)


def break_bytes(data: bytes, chance: random.Random) -> bytes:
    at = chance.randint(0, len(data))
    action = chance.randrange(4)
    if action == 0:
        return data[:at]
    if action == 1:
        return data[:at] + data[at + chance.randint(1, 9) :]
    if action == 2:
        return data[:at] + chance.randbytes(chance.randint(1, 3)) + data[at:]
    return data[:at] + bytes([chance.randrange(128)]) + data[at + 1 :]


def check_result(loaded: Loaded) -> None:
    """What the model promises of a desired state, and the manual of warnings."""
    keys = [frontend.key for _, frontend in loaded.desired.frontends()]
    assert len(keys) == len(set(keys))
    names = [service.name for service in loaded.desired.services]
    assert names == sorted(set(names))
    for _, frontend in loaded.desired.frontends():
        assert 1 <= frontend.port <= 65535
        families = {":" in backend.address for backend in frontend.backends}
        assert len(families) < 2
        assert ":" in frontend.address or True not in families
    for warning in loaded.warnings:
        assert re.match(r"\S*/m\.(json|yaml): ", warning), warning
        assert warning.splitlines() == [warning]


def check_error(error: InputError, *, only_structure: bool) -> None:
    assert re.match(r"\S*/m\.(json|yaml)(:[1-9][0-9]*)?: ", error.message), error.message
    assert error.message.isprintable(), error.message
    if only_structure:
        place = r"(:[1-9][0-9]*)?: (document \d+: )?"
        field = r"[a-zA-Z]\w*((\.\w+|\[.+?\])*): found .+, expected .+"
        whole = "found (.+, expected a mapping|no document, expected services)"
        assert re.search(f"{place}({field}|{whole})", error.message), error.message


def outcome(path: Path, what: str) -> Loaded | InputError:
    try:
        return load([path])
    except InputError as error:
        return error
    except Exception as error:  # noqa: BLE001 (that there is none is the point)
        pytest.fail(f"{error!r} from {what}")


def test_two_thousand_manifests(tmp_path: Path) -> None:
    seed = int(os.environ.get("SOCKHOP_TEST_SEED", random.SystemRandom().randrange(1 << 32)))
    print(f"SOCKHOP_TEST_SEED={seed}")
    chance = random.Random(seed)
    generator = Generator(chance)
    accepted = faulty_accepted = 0
    for number in range(COUNT):
        faults = chance.randint(1, 3) if number % 2 else 0
        kinds = [chance.choice(["structure", "text", "bytes"]) for _ in range(faults)]
        documents = generator.documents()
        for _ in range(kinds.count("structure")):
            if documents:
                break_structure(documents, chance)
        name, text = write(documents, chance)
        for _ in range(kinds.count("text")):
            text = break_text(text, chance)
        data = text.encode()
        for _ in range(kinds.count("bytes")):
            data = break_bytes(data, chance)
        path = tmp_path / name
        path.write_bytes(data)
        result = outcome(path, f"SOCKHOP_TEST_SEED={seed}, manifest {number}: {data!r}")
        if isinstance(result, InputError):
            assert faults, f"manifest {number}: {result}\n{text}"
            check_error(result, only_structure=set(kinds) == {"structure"})
        else:
            check_result(result)
            accepted += 1
            faulty_accepted += bool(faults)
    print(f"{accepted} of {COUNT} accepted, {faulty_accepted} of those with faults")
    assert accepted >= 0.3 * COUNT
    assert accepted - faulty_accepted == COUNT // 2
    assert faulty_accepted < COUNT // 2
