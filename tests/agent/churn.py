"""Clients that never stop, and a world that changes under them."""

import contextlib
import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from tests.sandbox import ServerThread, compact, publish

__all__ = ["VIP", "Loop", "churn", "random_state"]

VIP = "10.0.0.10"


class Loop:
    """Threads that connect all the time, and count answers and failures."""

    def __init__(self, address: str, *, threads: int = 2, translated: bool = True) -> None:
        """*translated*: getpeername() has to give the address that was dialled."""
        self.answers: Counter[str] = Counter()
        self.failures: list[str] = []
        self._address = address
        self._translated = translated
        self._switches = 0
        self._stop = threading.Event()
        self._began = time.monotonic()
        self._threads = [threading.Thread(target=self._run) for _ in range(threads)]
        for thread in self._threads:
            thread.start()

    @contextlib.contextmanager
    def switching(self) -> Iterator[None]:
        """Turn bypass on or off: a connect() may meet one and getpeername() the other."""
        self._switches += 1
        try:
            yield
        finally:
            self._switches += 1

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                self._connect()
            except OSError as error:
                self.failures.append(f"{time.monotonic() - self._began:.3f} s: {error!r}")

    def _connect(self) -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
            before = self._switches
            client.connect((self._address, 80))
            peer = client.getpeername()
            switched = before % 2 or self._switches != before
            if self._translated and not switched and peer != (self._address, 80):
                raise OSError(f"getpeername() is {peer}")
            self.answers["udp"] += 1
        with socket.create_connection((self._address, 80), timeout=5) as client:
            self.answers[client.recv(100).decode()] += 1

    def stop(self) -> float:
        """End it and return the connects per second."""
        self._stop.set()
        for thread in self._threads:
            thread.join(10)
        return self.answers.total() / (time.monotonic() - self._began)


def random_state(chance: random.Random, servers: list[ServerThread], *, address: str = VIP) -> str:
    """A manifest in which *address* always has a backend, among services that come and go."""
    some = chance.sample(servers, chance.randint(1, len(servers)))
    names = ["TCP", "UDP", *[f"extra{i}" for i in range(chance.randint(0, 20))]]
    services = {
        name: {
            "frontends": [f"10.0.1.{i}:80"] if i > 1 else [f"{address}:80/{name.lower()}"],
            "algorithm": chance.choice(["random", "round-robin", "maglev", "least-connections"]),
            "backends": [
                {"address": server.endpoint, "weight": chance.randint(1, 5)} for server in some
            ],
        }
        for i, name in enumerate(names)
    }
    return compact(**services)


def churn(chance: random.Random, path: Path, servers: list[ServerThread], *, until: float) -> None:
    """Publish one random state after the other."""
    while time.monotonic() < until:
        publish(path, random_state(chance, servers))
        time.sleep(chance.uniform(0, 0.05))
