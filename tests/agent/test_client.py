"""What a command says where an agent does not answer as it should."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from sockhop.agent import client
from sockhop.agent.client import ask_agent
from sockhop.errors import SystemLackError

pytestmark = pytest.mark.unit


@contextmanager
def answering(path: Path, answer: bytes | None) -> Iterator[None]:
    """Something that answers one request with *answer*, or never."""
    asked = threading.Event()

    def serve() -> None:
        connection, _ = listener.accept()
        with connection:
            connection.recv(4096)
            if answer is None:
                asked.wait(5)
            else:
                connection.sendall(answer)

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        thread = threading.Thread(target=serve)
        thread.start()
        yield
        asked.set()
        thread.join(5)


@pytest.mark.parametrize(
    ("answer", "complaint"),
    [
        (b'HTTP/1.1 200 OK\r\n\r\n{"pid": 7, "vers', "not an agent's of this version"),
        (b'HTTP/1.1 200 OK\r\n\r\n{"pid": 7}', "not an agent's of this version"),
        (b"HTTP/1.1 404 Not Found\r\n\r\n404: Not Found", "not an agent's of this version"),
        (b'HTTP/1.1 403 Forbidden\r\n\r\n{"error": "for root"}', "for root"),
        (b"", "not an agent's of this version"),
        (None, "does not answer within 0.2 s"),
    ],
    ids=["killed", "old", "older", "refused", "nothing", "never"],
)
def test_an_answer_that_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: bytes | None, complaint: str
) -> None:
    monkeypatch.setattr(client, "_SECONDS", 0.2)
    with (
        answering(tmp_path / "api.sock", answer),
        pytest.raises(SystemLackError, match=complaint),
    ):
        ask_agent(tmp_path / "api.sock")


def test_no_agent(tmp_path: Path) -> None:
    assert ask_agent(tmp_path / "api.sock") is None
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "api.sock"))
    assert ask_agent(tmp_path / "api.sock") is None
