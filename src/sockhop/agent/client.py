"""Asks a running agent, through its API (agent/api.py)."""

import socket
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import msgspec

from sockhop.agent.state import AgentState, BackendRequest, HeldChange, Override
from sockhop.errors import SystemLackError

__all__ = ["RunningAgent", "approve_changes", "ask_agent", "set_backend"]

_SECONDS = 5
T = TypeVar("T")


class _Refusal(msgspec.Struct):
    """What comes with every status but 200."""

    error: str


class RunningAgent(NamedTuple):
    """What an agent says of itself, and its pid as this process sees it."""

    state: AgentState
    pid: int


def ask_agent(api: Path) -> RunningAgent | None:
    """Ask the agent that listens on the Unix socket *api*; None where nobody does."""
    answer = _ask(api, "GET /v1/status", b"", AgentState)
    return RunningAgent(*answer) if answer else None


def approve_changes(api: Path, changes: Sequence[int] | None) -> list[HeldChange] | None:
    """Have the agent let go what is held, all or *changes*; None where no agent listens."""
    body = msgspec.json.encode({"changes": changes})
    answer = _ask(api, "POST /v1/approve", body, list[HeldChange])
    return answer[0] if answer else None


def set_backend(api: Path, request: BackendRequest) -> list[Override] | None:
    """Give a backend a state by hand, or end that; None where no agent listens."""
    answer = _ask(api, "POST /v1/backend", msgspec.json.encode(request), list[Override])
    return answer[0] if answer else None


def _ask(api: Path, request: str, body: bytes, kind: type[T]) -> tuple[T, int] | None:
    """Return the answer as *kind*, and the agent's pid; None where no agent listens."""
    try:
        pid, answer = _exchange(api, request, body)
    except (FileNotFoundError, ConnectionRefusedError):
        return None
    except TimeoutError:
        raise SystemLackError(
            f"{api}: the agent does not answer within {_SECONDS} s",
            hint="it is busy with a large change, or hangs: see its log",
        ) from None
    except OSError as error:
        raise SystemLackError(
            f"{api}: {error.strerror or error}", hint="run as root, or name the socket with --api"
        ) from None
    head, _, content = answer.partition(b"\r\n\r\n")
    try:
        if b" 200 " in head.partition(b"\r\n")[0]:
            return msgspec.json.decode(content, type=kind), pid
        problem = msgspec.json.decode(content, type=_Refusal).error
    except msgspec.DecodeError:
        raise SystemLackError(
            f"{api}: the answer is not an agent's of this version",
            hint="is it ending, or another version? restart it",
        ) from None
    raise SystemLackError(f"{api}: {problem}")


def _exchange(api: Path, request: str, body: bytes) -> tuple[int, bytes]:
    # HTTP/1.0: the answer ends with the connection. http.client takes 25 ms to import.
    head = f"{request} HTTP/1.0\r\nHost: sockhop\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(_SECONDS)
        connection.connect(str(api))
        peer = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("=iII"))
        connection.sendall(head.encode() + body)
        answer = b"".join(iter(lambda: connection.recv(1 << 16), b""))
    pid, _, _ = struct.unpack("=iII", peer)
    return pid, answer
