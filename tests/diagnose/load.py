"""A server that does what it is told, and connections of others, opened and closed all the time."""

import socket
import threading
from contextlib import suppress

from tests.splice.stage import Place, Stage

__all__ = ["REQUEST", "SERVER", "Load", "Server"]

SERVER = Place.VETH4.server
REQUEST = b"GET /health HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n"
ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nOK"


class Server:
    """Answers, or does what it is told, in threads of its own."""

    def __init__(
        self,
        stage: Stage,
        does: str = "answer",
        answer: bytes = ANSWER,
        *,
        listener: socket.socket | None = None,
    ) -> None:
        self.does = does
        self._answer = answer
        self._kept: list[socket.socket] = []
        self.listener = listener or stage.listen(Place.VETH4)
        self.port = int(self.listener.getsockname()[1])
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        with suppress(OSError):
            while True:
                made = self.listener.accept()[0]
                self._kept.append(made)
                threading.Thread(target=self._serve, args=(made,), daemon=True).start()

    def _serve(self, made: socket.socket) -> None:
        if self.does == "not read":
            return
        with suppress(OSError):
            made.recv(4096)
            if self.does.startswith("answer"):
                made.sendall(self._answer)
            if self.does in ("answer", "close"):
                made.close()

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):
            self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        self._thread.join(5)
        for each in self._kept:
            each.close()


class Load:
    """Connections of others, opened, used and closed all the time."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self._stop = threading.Event()
        self.count = 0
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        with Server(self._stage) as server:
            while not self._stop.is_set():
                with self._stage.client(Place.VETH4) as client:
                    client.settimeout(5)
                    client.connect((SERVER, server.port))
                    client.sendall(REQUEST)
                    assert client.recv(4096)
                self.count += 1

    def __enter__(self) -> "Load":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
