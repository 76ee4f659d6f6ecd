"""The shares of backends, measured on live connects."""

import random
import socket
import statistics
from collections import Counter
from pathlib import Path

import pytest

from sockhop.datapath.records import Total
from sockhop.model import Algorithm
from tests.datapath.node import Node, backend, service

pytestmark = pytest.mark.kernel

VIP = "10.9.1.1"
WEIGHTS = (1, 2, 3, 10)
CONNECTS = 100_000
# The chi-square of three degrees of freedom is above this once in a million.
LIMIT = 30.66
ADDRESSES = tuple(f"127.0.1.{number}" for number in range(1, 5))


@pytest.fixture(autouse=True)
def _fresh_services(node: Node) -> None:
    node.install()


def install(node: Node, algorithm: Algorithm, weights: tuple[int, ...] = WEIGHTS) -> None:
    backends = [
        backend(f"{address}:7000", weight=weight)
        for address, weight in zip(ADDRESSES, weights, strict=True)
    ]
    node.install(service("s", f"{VIP}:53/udp", backends=backends, algorithm=algorithm))


def connected() -> socket.socket:
    client = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    client.connect((VIP, 53))
    return client


def shares(node: Node, connects: int) -> Counter[str]:
    """Return how many connects each backend got, none of them counted twice."""
    found: Counter[str] = Counter()
    for _ in range(connects):
        with connected() as client:
            found[node.chosen(client.fileno())[0]] += 1
    return found


def chi_square(found: Counter[str]) -> float:
    expected = {
        address: found.total() * weight / sum(WEIGHTS)
        for address, weight in zip(ADDRESSES, WEIGHTS, strict=True)
    }
    assert found.keys() <= expected.keys()
    return sum((found[address] - n) ** 2 / n for address, n in expected.items())


@pytest.mark.parametrize("algorithm", [Algorithm.RANDOM, Algorithm.MAGLEV])
def test_connects_match_the_weights(node: Node, algorithm: Algorithm) -> None:
    install(node, algorithm)
    found = shares(node, CONNECTS)
    slack = 0.0
    if algorithm is Algorithm.MAGLEV:  # a table's shares are whole entries
        slack = found.total() * 0.01**2 * len(WEIGHTS)
    assert chi_square(found) < LIMIT + slack, found


def test_shares_without_the_alias_table_are_noticed(node: Node, tmp_path: Path) -> None:
    install(node, Algorithm.RANDOM)
    with node.mutated(tmp_path, ("chosen->keep == KEEP_ALWAYS ||", "1 ||")):
        assert chi_square(shares(node, CONNECTS // 10)) > LIMIT


def test_round_robin_is_exact(node: Node) -> None:
    install(node, Algorithm.ROUND_ROBIN)
    turns = 50
    found = shares(node, turns * sum(WEIGHTS))
    assert found == {
        address: turns * weight for address, weight in zip(ADDRESSES, WEIGHTS, strict=True)
    }


def test_maglev_keeps_what_is_bound(node: Node) -> None:
    """A socket with a port of its own goes to the same backend again, here and on every node."""
    install(node, Algorithm.MAGLEV)
    chosen: dict[int, tuple[str, int]] = {}
    for _ in range(2):
        for port in range(20000, 20064):
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
                client.bind(("127.0.0.1", port))
                client.connect((VIP, 53))
                found = node.chosen(client.fileno())
            assert chosen.setdefault(port, found) == found
    assert len(set(chosen.values())) > 1


def test_maglev_moves_few_live_connects_on_a_removal(node: Node) -> None:
    def where() -> dict[int, tuple[str, int]]:
        found = {}
        for port in range(21000, 23000):
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
                client.bind(("127.0.0.1", port))
                client.connect((VIP, 53))
                found[port] = node.chosen(client.fileno())
        return found

    backends = [backend(f"127.0.1.{number}:7000") for number in range(1, 11)]
    frontend = f"{VIP}:53/udp"
    node.install(service("s", frontend, backends=backends, algorithm=Algorithm.MAGLEV))
    before = where()
    gone = (backends[3].address, 7000)
    del backends[3]
    node.install(service("s", frontend, backends=backends, algorithm=Algorithm.MAGLEV))
    after = where()
    moved = sum(after[port] != there for port, there in before.items() if there != gone)
    # Of 2,000 those of the backend that is gone have to move, and of the others 2 % may.
    assert moved <= 0.02 * len(before)
    assert gone not in after.values()


def spread(node: Node, algorithm: Algorithm, seed: int) -> float:
    """Return how unequal the backends' live connections are after a while of uneven lifetimes."""
    install(node, algorithm, (1, 1, 1, 1))
    chance = random.Random(seed)
    living: list[tuple[float, socket.socket]] = []
    spreads = []
    try:
        for now in range(6000):
            client = connected()
            # Many are short and some are very long: a Pareto distribution without a variance.
            living.append((now + 20 * chance.paretovariate(1.2), client))
            for end, ended in living:
                if end <= now:
                    ended.close()
            living = [(end, client) for end, client in living if end > now]
            if now >= 1000 and not now % 100:
                live = node.live()
                assert live.total() == len(living)
                spreads.append(statistics.pstdev(live[address, 7000] for address in ADDRESSES))
    finally:
        for _, client in living:
            client.close()
    return statistics.mean(spreads)


def test_least_connections_is_nearer_to_equal_than_random(node: Node, tmp_path: Path) -> None:
    seed = random.SystemRandom().randrange(1 << 32)
    by_chance = spread(node, Algorithm.RANDOM, seed)
    by_load = spread(node, Algorithm.LEAST_CONNECTIONS, seed)
    assert by_load < 0.75 * by_chance, seed
    with node.mutated(tmp_path, ("load_of(other.backend) * chosen->weight <", "0 && 0 <")):
        assert spread(node, Algorithm.LEAST_CONNECTIONS, seed) > by_load / 0.75, seed
    assert node.total(Total.LIVE_FULL) == 0
