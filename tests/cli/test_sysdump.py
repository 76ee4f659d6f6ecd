"""A sysdump has what a bug report needs, nobody's secrets, and leaves nothing behind."""

import base64
import io
import json
import os
import pty
import signal
import socket
import stat
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sockhop.cli.scrub import HIDDEN, scrub, scrub_log
from sockhop.cli.sysdump_parts import PARTS
from tests.agent.holding import HoldingServer
from tests.sandbox import SOCKHOP, Sandbox, publish, wait_until

FEW = settings(max_examples=60, deadline=None)
# What must not be in it, each planted in a place of its own.
ENVIRONMENT = "environ-5f2c90b1"
ARGUMENT = "argument-77d1e0aa"
PAYLOAD = "payload-d09c41e7"
OBJECT = "object-e2b8c1f4"
ANNOTATION = "annotation-9b7d02e6"
HEALTH = "health-41ac88d3"
MISTAKE = "mistake-c3e9720f"
PLANTED = (ENVIRONMENT, ARGUMENT, PAYLOAD, OBJECT, ANNOTATION, HEALTH, MISTAKE)
UNSCRUBBED = """
import sys
import sockhop.cli.sysdump_parts as parts
parts.scrub = parts.scrub_log = lambda found: found
from sockhop.cli.main import main
sys.argv[0] = "sockhop"
main()
"""
STUCK = """
import sys, time
import sockhop.cli.sysdump as sysdump
from sockhop.cli.sysdump_parts import Part
def wait():
    print("waiting", flush=True)
    time.sleep(60)
sysdump.PARTS = (*sysdump.PARTS[:1], Part("stuck", "", wait))
{}
from sockhop.cli.main import main
sys.argv[0] = "sockhop"
main()
"""
NAMED = "sysdump._new_file = sysdump._named_file"


def unpacked(path: Path) -> dict[str, bytes]:
    """Return the files of an archive by their last names."""
    with tarfile.open(fileobj=io.BytesIO(path.read_bytes()), mode="r:gz") as archive:
        found = {}
        for entry in archive:
            assert entry.isfile()
            assert entry.name.count("/") == 1
            content = archive.extractfile(entry)
            assert content
            found[entry.name.partition("/")[2]] = content.read()
        return found


def leaks(files: dict[str, bytes]) -> set[str]:
    """Return which of the planted secrets are there, as they are or encoded."""
    everything = b"\n".join(files.values())
    return {
        secret
        for secret in PLANTED
        if secret.encode() in everything
        or base64.b64encode(secret.encode()).rstrip(b"=")[:-1] in everything
        or secret.encode().hex().encode() in everything
    }


def manifest(backend: str) -> str:
    return f"""
version: 1
services:
  - name: web
    frontends: ["10.96.0.1:80/tcp"]
    backends: ["{backend}"]
    health: {{http: {{path: "/health?token={HEALTH}"}}, interval: 5s, fall: 10}}
"""


KUBERNETES = f"""
apiVersion: v1
kind: Secret
metadata: {{name: tls}}
stringData: {{password: {OBJECT}}}
---
apiVersion: v1
kind: Service
metadata: {{name: api, annotations: {{example.com/token: {ANNOTATION}}}}}
spec: {{clusterIP: 10.96.0.1, ports: [{{port: 81}}]}}
"""


@pytest.fixture
def planted(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> Iterator[Sandbox]:
    """An agent, a connection and a process that know secrets."""
    monkeypatch.setenv("SOCKHOP_TEST_PASSWORD", ENVIRONMENT)
    directory = sandbox.directory / "manifests"
    directory.mkdir()
    with HoldingServer("127.0.0.1") as server:
        good, bad = map(manifest, (server.endpoint, MISTAKE))
        publish(directory / "web.yaml", good)
        publish(directory / "objects.yaml", KUBERNETES)
        with (
            sandbox.agent(directory) as agent,
            socket.create_connection(("10.96.0.1", 80)) as client,
            subprocess.Popen(["sh", "-c", "read line", ARGUMENT], stdin=subprocess.PIPE) as process,
        ):
            client.sendall(PAYLOAD.encode())
            publish(directory / "web.yaml", bad)
            wait_until(lambda: MISTAKE in agent.status()["source"]["error"], "the mistake is seen")
            yield sandbox
            assert process.stdin
            process.stdin.close()


@pytest.mark.kernel
def test_all_parts_and_no_secrets(planted: Sandbox) -> None:
    where = planted.directory / "dump.tar.gz"
    done = planted.sockhop("sysdump", "--to", str(where))
    assert done.stdout == f"{where}\n"
    assert done.stderr == ""
    assert stat.S_IMODE(where.stat().st_mode) == 0o600
    files = unpacked(where)
    may_be_empty = {"agent.log", "events.jsonl", "kernel.config"}
    assert (
        set(files) | may_be_empty == {part.name for part in PARTS} | {"README.txt"} | may_be_empty
    )
    assert leaks(files) == set()
    told: dict[str, Any] = {
        name: json.loads(data) for name, data in files.items() if name.endswith(".json")
    }
    assert told["status.json"]["balancing"]
    assert HIDDEN in told["status.json"]["agent"]["source"]["error"]
    assert "web.yaml" in told["status.json"]["agent"]["source"]["error"]
    assert {row["service"] for row in told["services.json"]} >= {"web"}
    assert told["maps.json"]["frontends"]["entries"]
    names = [each["value"]["name"] for each in told["maps.json"]["services"]["entries"]]
    assert "web" in names
    assert sum(row["sockets"] for row in told["sockets.json"]["of"]) >= 1
    assert told["features.json"]["structs"]["sock"]
    assert told["advisories.json"]["tried"]
    assert "rules" in told["orders.json"]
    # Without the scrubbing the mistake in the manifest is quoted.
    open_where = planted.directory / "open.tar.gz"
    planted.run(sys.executable, "-c", UNSCRUBBED, "sysdump", "--to", str(open_where))
    assert MISTAKE in leaks(unpacked(open_where))


@pytest.mark.kernel
def test_without_root_it_has_what_it_can(sandbox: Sandbox) -> None:
    sandbox.directory.chmod(0o777)
    where = sandbox.directory / "dump.tar.gz"
    done = sandbox.run(
        "setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups",
        str(SOCKHOP), "sysdump", "--to", str(where),
    )  # fmt: skip
    files = unpacked(where)
    assert {"versions.json", "features.json", "README.txt"} <= set(files)
    assert "note: not in it: maps.json" in done.stderr
    assert "not in it: maps.json" in files["README.txt"].decode()
    assert where.stat().st_uid == 65534


@pytest.mark.unit
@pytest.mark.parametrize(
    ("change", "number"),
    [("", signal.SIGINT), ("", signal.SIGKILL), (NAMED, signal.SIGINT)],
)
def test_who_interrupts_it_leaves_nothing(tmp_path: Path, change: str, number: int) -> None:
    where = tmp_path / "dump.tar.gz"
    with subprocess.Popen(
        [sys.executable, "-c", STUCK.format(change), "sysdump", "--to", where],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=tmp_path, text=True,
    ) as process:  # fmt: skip
        assert process.stdout
        assert process.stdout.readline() == "waiting\n"
        assert len(list(tmp_path.iterdir())) == (1 if change else 0)
        process.send_signal(number)
        assert process.wait(20) == (130 if number == signal.SIGINT else -number)
        assert process.stderr
        assert process.stderr.read().strip() == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.unit
def test_a_file_system_without_unnamed_files(tmp_path: Path) -> None:
    where = tmp_path / "dump.tar.gz"
    script = STUCK.format(NAMED).replace("time.sleep(60)", "return b'x'")
    subprocess.run(
        [sys.executable, "-c", script, "sysdump", "--to", where],
        check=True, capture_output=True, timeout=60,
    )  # fmt: skip
    assert set(unpacked(where)) == {"versions.json", "stuck", "README.txt"}
    assert stat.S_IMODE(where.stat().st_mode) == 0o600
    assert list(tmp_path.iterdir()) == [where]


@pytest.mark.unit
def test_nothing_is_overwritten_and_mistakes_are_named(tmp_path: Path) -> None:
    there = tmp_path / "there"
    there.write_text("precious")
    for target, what in ((there, "this exists already"),
                         (tmp_path / "no" / "x", "No such file or directory"),
                         (there / "x", "Not a directory")):  # fmt: skip
        done = subprocess.run(
            [SOCKHOP, "sysdump", "--to", target],
            check=False, capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert done.returncode == 2
        assert done.stderr.startswith(f"sockhop: {target}: {what}")
    assert there.read_text() == "precious"


@pytest.mark.kernel
def test_a_full_file_system(sandbox: Sandbox) -> None:
    full = sandbox.directory / "full"
    full.mkdir()
    script = (
        f"mount -t tmpfs -o size=4k none {full} && $0 sysdump --to {full}/x; s=$?; ls -A {full}"
    )
    done = sandbox.run(
        "unshare", "--mount", "sh", "-c", f"{script}; exit $s", str(SOCKHOP), check=False
    )
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr == f"sockhop: {full}/x: No space left on device\n"


@pytest.mark.unit
def test_a_terminal_shows_how_far_it_is(tmp_path: Path) -> None:
    master, slave = pty.openpty()
    script = STUCK.format("").replace("time.sleep(60)", "return b'x'")
    try:
        subprocess.run(
            [sys.executable, "-c", script, "sysdump", "--to", tmp_path / "x"],
            check=True, stdout=subprocess.PIPE, stderr=slave, timeout=60,
        )  # fmt: skip
        shown = os.read(master, 1 << 16).decode()
    finally:
        os.close(master)
        os.close(slave)
    assert "\r\x1b[K1 of 2 parts: versions.json\r\x1b[K2 of 2 parts: stuck\r\x1b[K" in shown


# --- scrubbing ---------------------------------------------------------------------------------

SECRETS = st.from_regex(r"[A-Za-z0-9]{16,24}", fullmatch=True)
PLACES = st.sampled_from([
    "https://admin:{}@etcd.example:2379/x", "Authorization: Bearer {}", "?token={}&x=1",
    "password={}", "API_KEY: {}", '{{"secret": "{}"}}', "found '{}', expected a port",
    "found ['{}', 'b'], expected a mapping", "eyJhbGciOiJ.{}.sig", "client_secret = '{}'",
    "-----BEGIN PRIVATE KEY-----\n{}\n-----END PRIVATE KEY-----", "Basic {}",
])  # fmt: skip


@pytest.mark.unit
@FEW
@given(SECRETS, PLACES, st.text(max_size=20))
def test_secrets_by_their_look(secret: str, place: str, around: str) -> None:
    text = f"{around} {place.format(secret)} "
    assert secret not in scrub(text)
    assert secret not in scrub_log(text)
    assert secret not in json.dumps(scrub({"a": [text, {"b": text}], "error": text}))


@pytest.mark.unit
@FEW
@given(SECRETS, st.sampled_from(["password", "apiKey", "X-Auth-Token", "clientSecret"]))
def test_secrets_by_their_name(secret: str, name: str) -> None:
    assert scrub({name: secret}) == {name: HIDDEN}


@pytest.mark.unit
@FEW
@given(st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda each: st.lists(each) | st.dictionaries(st.text(), each), max_leaves=10,
))  # fmt: skip
def test_whatever_it_is_it_keeps_its_form(value: Any) -> None:
    once = scrub(value)
    assert json.loads(json.dumps(once)) == once
    assert type(once) is type(value)
    if isinstance(value, dict | list):
        assert len(once) == len(value)


@pytest.mark.unit
def test_what_is_no_secret_stays() -> None:
    for text in (
        "sockhop.service: default/token-service:80 has 2 backends",
        "10.96.0.1:80 > 127.0.0.1:8080",
        'Linux kernel commit d74bad4e74ee ("bpf: Hooks for sys_connect") (in v4.17)',
    ):
        assert scrub(text) == text
