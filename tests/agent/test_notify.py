"""A service manager that does not read must not hold up the agent."""

import socket
import time
from pathlib import Path

import pytest

from sockhop.agent.notify import notify

pytestmark = pytest.mark.unit


def test_a_manager_that_does_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "notify"
    monkeypatch.setenv("NOTIFY_SOCKET", str(path))
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(path))
        begin = time.monotonic()
        notify("READY=1", "STATUS=0")
        # More than any queue has room for (net.unix.max_dgram_qlen).
        for number in range(1, 1000):
            notify(f"STATUS={number}")
        assert time.monotonic() - begin < 2
        assert manager.recv(100) == b"READY=1\nSTATUS=0"
        assert manager.recv(100) == b"STATUS=1"


def test_nobody_listens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "nowhere"))
    notify("READY=1")
    monkeypatch.delenv("NOTIFY_SOCKET")
    notify("READY=1")
