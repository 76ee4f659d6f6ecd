"""What an agent listens on is taken before anything is changed, and only if it is free."""

import socket
from pathlib import Path

import pytest

from sockhop.agent.listening import api_listener, metrics_listeners, remove_socket
from sockhop.errors import InputError, SystemLackError
from tests.sandbox import Sandbox, compact

WEB = {"frontends": ["10.96.0.1:80"], "backends": ["127.0.0.1:8080"]}


@pytest.mark.unit
def test_a_dead_agents_socket_is_replaced_and_goes_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "run" / "api.sock"
    path.parent.mkdir()
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    with api_listener(path) as listener:
        assert path.stat().st_mode & 0o777 == 0o600
        with socket.socket(socket.AF_UNIX) as client, pytest.raises(ConnectionRefusedError):
            client.connect(str(path))
        listener.listen()
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))
    assert not path.exists()


@pytest.mark.unit
def test_a_living_agents_socket_and_what_is_none_stay(tmp_path: Path) -> None:
    path, file = tmp_path / "api.sock", tmp_path / "notes"
    file.write_text("mine")
    with api_listener(path) as listener:
        listener.listen()
        for each in (path, file):
            assert not remove_socket(each)
            with pytest.raises(SystemLackError, match="another agent, or something else"):
                api_listener(each).__enter__()
        assert path.is_socket()
    assert file.read_text() == "mine"


@pytest.mark.unit
@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("127.0.0.1", "expected HOST:PORT"),
        (":80", "expected HOST:PORT"),
        ("127.0.0.1:70000", "expected HOST:PORT"),
        ("192.0.2.1:9464", "annot assign requested address\n  such as 127.0.0.1:9464"),
    ],
)
def test_where_no_metrics_can_be(text: str, said: str) -> None:
    with pytest.raises(InputError, match=said), metrics_listeners(text):
        pass


@pytest.mark.kernel
def test_an_agent_that_cannot_listen_changes_nothing() -> None:
    with Sandbox() as sandbox:
        manifest = sandbox.manifest(compact(web=WEB))
        with socket.create_server(("127.0.0.1", 0)) as taken:
            there = f"127.0.0.1:{taken.getsockname()[1]}"
            for arguments, status, said in (
                (("--metrics", there), 2, "another program listens there"),
                (("--api", str(manifest)), 3, "name another socket"),
            ):
                done = sandbox.sockhop("agent", "-f", str(manifest), *arguments, check=False)
                assert done.returncode == status, done.stderr
                assert said in done.stderr
                assert not sandbox.pins.exists()
        assert manifest.exists()
