"""`sockhop get services` says where a frontend holds."""

import json
import subprocess
from pathlib import Path

import pytest

from tests.clients import bpftool
from tests.sandbox import SOCKHOP, Sandbox, compact

pytestmark = pytest.mark.kernel

MANIFEST = compact(
    far={"frontends": ["10.96.0.10:80"], "backends": ["10.1.0.2:80"]},
    mixed={"frontends": ["10.96.0.11:80"], "backends": ["10.1.0.2:80", "127.0.0.1:7001"]},
    near={"frontends": ["127.96.0.1:80"], "backends": ["127.0.0.1:7001"]},
)


def rows(text: str) -> list[list[str]]:
    """The cells of a table whose cells are separated by two spaces."""
    return [[cell.strip() for cell in line.split("  ") if cell.strip()]
            for line in text.splitlines()]  # fmt: skip


def test_scope(sandbox: Sandbox) -> None:
    netns = f"netns {Path('/proc/thread-self/ns/net').stat().st_ino}"
    cookie = bpftool.netns_cookie()
    with sandbox.agent(sandbox.manifest(MANIFEST)):
        table = rows(sandbox.sockhop("get", "services").stdout)
        assert table[0][:5] == ["SERVICE", "FRONTEND", "SCOPE", "TYPE", "BACKENDS"]
        assert [row[:3] + row[4:5] for row in table[1:]] == [
            ["far", "10.96.0.10:80/tcp", "everywhere", "1"],
            ["mixed", "10.96.0.11:80/tcp", "elsewhere", "1"],
            ["mixed", "10.96.0.11:80/tcp", netns, "2"],
            ["near", "127.96.0.1:80/tcp", netns, "1"],
        ]
        wide = rows(sandbox.sockhop("get", "services", "-o", "wide").stdout)
        assert "NETNS-COOKIE" in wide[0]
        assert "NETNS" in rows(sandbox.sockhop("get", "sockets", "-o", "wide").stdout)[0]
        found = json.loads(sandbox.sockhop("get", "services", "-o", "json").stdout)
        assert [(row["service"], row["scope"], row["netns_cookie"]) for row in found] == [
            ("far", "everywhere", 0), ("mixed", "elsewhere", 0), ("mixed", netns, cookie),
            ("near", "nowhere else", 0), ("near", netns, cookie),
        ]  # fmt: skip
        # In another namespace the inode of this one is not known.
        elsewhere = subprocess.run(
            ["unshare", "--net", SOCKHOP, "get", "services"],
            env=sandbox.environment, capture_output=True, text=True, check=True, timeout=60,
        )  # fmt: skip
        assert [row[2] for row in rows(elsewhere.stdout)[3:]] == [f"netns-cookie {cookie}"] * 2


def test_status_counts_in_words(sandbox: Sandbox) -> None:
    def installed() -> str:
        lines: list[str] = sandbox.sockhop("status").stdout.splitlines()
        return next(line for line in lines if line.startswith("installed"))

    one = compact(web={"frontends": ["10.96.0.10:80"], "backends": ["10.1.0.2:80"]})
    with sandbox.agent(sandbox.manifest(one)):
        assert "  1 service, 1 frontend, 1 backend, generation 1" in installed()
    with sandbox.agent(sandbox.manifest(MANIFEST)):
        assert "  3 services, 3 frontends, 4 backends, generation 2" in installed()
