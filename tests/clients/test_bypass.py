"""The emergency switch: every connect passes untouched, at once, until it is switched off."""

import errno
import json
import signal
import socket
from collections.abc import Iterator

import pytest

from tests.clients.dialers import family_of
from tests.sandbox import Sandbox, ServerThread, compact

pytestmark = pytest.mark.kernel

PORT, BACKEND_PORT = 80, 7001
# What is dialled, and its backend as such a socket sees it.
FORMS = {
    "10.96.0.10": "127.0.0.1",
    "fd00:96::10": "::1",
    "::ffff:10.96.0.10": "::ffff:127.0.0.1",
}
KINDS = (socket.SOCK_STREAM, socket.SOCK_DGRAM)


@pytest.fixture
def node(sandbox: Sandbox) -> Iterator[Sandbox]:
    with (
        ServerThread("one", "127.0.0.1", BACKEND_PORT),
        ServerThread("one", "127.0.0.1", BACKEND_PORT, udp=True),
        ServerThread("one", "::1", BACKEND_PORT),
        ServerThread("one", "::1", BACKEND_PORT, udp=True),
    ):
        yield sandbox


MANIFEST = compact(
    web={
        "frontends": [f"10.96.0.10:{PORT}/tcp+udp", f"[fd00:96::10]:{PORT}/tcp+udp"],
        "backends": [f"127.0.0.1:{BACKEND_PORT}", f"[::1]:{BACKEND_PORT}"],
    },
    nobody={"frontends": [f"10.96.0.13:{PORT}"], "backends": []},
)


def dial(address: str, kind: socket.SocketKind, port: int = PORT) -> int:
    """connect() and return its error number."""
    with socket.socket(family_of(address), kind) as client:
        return client.connect_ex((address, port))


def assert_bypassed(held: dict[socket.socket, str]) -> None:
    """New connects go where they say; open connections show where they really are."""
    for address, backend in FORMS.items():
        for kind in KINDS:
            assert dial(address, kind) == errno.ENETUNREACH
            assert dial(backend, kind, BACKEND_PORT) == 0
    # Not even "no backend" is ours to say.
    assert dial("10.96.0.13", socket.SOCK_STREAM) == errno.ENETUNREACH
    for client, address in held.items():
        assert client.getpeername()[:2] == (FORMS[address], BACKEND_PORT)


def assert_balanced(held: dict[socket.socket, str]) -> None:
    for address in FORMS:
        for kind in KINDS:
            assert dial(address, kind) == 0
    assert dial("10.96.0.13", socket.SOCK_STREAM) == errno.EHOSTUNREACH
    for client, address in held.items():
        assert client.getpeername()[:2] == (address, PORT)


@pytest.fixture
def held(node: Sandbox) -> Iterator[dict[socket.socket, str]]:
    """Sockets to connect before the switch, by what they will dial."""
    clients = {socket.socket(family_of(address), kind): address
               for address in FORMS for kind in KINDS}  # fmt: skip
    yield clients
    for client in clients:
        client.close()


def test_bypass(node: Sandbox, held: dict[socket.socket, str]) -> None:
    manifest = node.manifest(MANIFEST)
    with node.agent(manifest) as agent:
        for client, address in held.items():
            client.connect((address, PORT))
        assert_balanced(held)

        node.sockhop("bypass", "on")
        assert_bypassed(held)
        answer = node.sockhop("status", "-o", "json", check=False)
        assert (answer.returncode, json.loads(answer.stdout)["bypass"]) == (1, True)
        assert "bypass off" in node.sockhop("status", check=False).stdout

        # Neither a change of the services nor the agent's death ends it.
        generation = agent.status()["generation"]
        services = json.loads(MANIFEST)["services"]
        fields = {service.pop("name"): service for service in services}
        node.manifest(compact(**fields, more={"frontends": ["10.96.0.14:80"], "backends": []}))
        agent.wait_generation(generation)
        assert_bypassed(held)
        agent.stop(signal.SIGKILL)
        assert_bypassed(held)
    with node.agent(manifest):
        assert_bypassed(held)
        assert node.sockhop("status", check=False).returncode == 1

        node.sockhop("bypass", "off")
        assert_balanced(held)
        assert node.sockhop("status").returncode == 0


def test_without_anything_to_bypass(sandbox: Sandbox) -> None:
    answer = sandbox.sockhop("bypass", "on", check=False)
    assert answer.returncode == 3
    assert "nothing is installed" in answer.stderr
