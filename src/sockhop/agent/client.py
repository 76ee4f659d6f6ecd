"""Asks a running agent, through its API (agent/api.py)."""

import socket
import struct
from pathlib import Path
from typing import NamedTuple

import msgspec

from sockhop.agent.state import AgentState
from sockhop.errors import SystemLackError

__all__ = ["RunningAgent", "ask_agent"]

_SECONDS = 5
# HTTP/1.0: the answer ends with the connection. http.client takes 25 ms to import.
_REQUEST = b"GET /v1/status HTTP/1.0\r\nHost: sockhop\r\n\r\n"


class RunningAgent(NamedTuple):
    """What an agent says of itself, and its pid as this process sees it."""

    state: AgentState
    pid: int


def ask_agent(api: Path) -> RunningAgent | None:
    """Ask the agent that listens on the Unix socket *api*; None where nobody does."""
    try:
        pid, answer = _exchange(api)
    except (FileNotFoundError, ConnectionRefusedError):
        return None
    except OSError as error:
        raise SystemLackError(
            f"{api}: {error.strerror or error}", hint="run as root, or name the socket with --api"
        ) from None
    head, _, body = answer.partition(b"\r\n\r\n")
    if b" 200 " not in head.partition(b"\r\n")[0]:
        raise SystemLackError(f"{api}: {body.decode(errors='replace')}", hint="run as root")
    return RunningAgent(msgspec.json.decode(body, type=AgentState), pid)


def _exchange(api: Path) -> tuple[int, bytes]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(_SECONDS)
        connection.connect(str(api))
        peer = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("=iII"))
        connection.sendall(_REQUEST)
        answer = b"".join(iter(lambda: connection.recv(1 << 16), b""))
    pid, _, _ = struct.unpack("=iII", peer)
    return pid, answer
