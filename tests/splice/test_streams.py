"""Random streams arrive whole, in order, at their own socket; and they are in fact spliced."""

import os

import pytest

from tests.splice.stage import Place, Stage
from tests.splice.streams import run_streams
from tests.splice.tcpinfo import tcp_info

pytestmark = pytest.mark.kernel

STREAMS = int(os.environ.get("SOCKHOP_STREAMS", "10000"))
SEED = int(os.environ.get("SOCKHOP_SEED", "1"))


@pytest.mark.parametrize("place", Place)
def test_random_streams(place: Place) -> None:
    share = STREAMS // len(Place)
    with Stage() as stage:
        outcome = run_streams(stage, place, count=share, seed=SEED)
        assert stage.counters().pairs == share
        assert not stage.entries()
    # The rest begins with a message that is larger than the budget.
    assert outcome.spliced >= 0.9 * outcome.directions
    assert outcome.wholly >= 0.7 * outcome.directions


@pytest.mark.parametrize("place", Place)
def test_the_stack_stands_still(place: Place) -> None:
    with Stage() as stage:
        client, server = stage.connected(place)
        with client, server:
            for _ in range(100):
                client.sendall(b"request")
                assert server.recv(100) == b"request"
                server.sendall(b"answer")
                assert client.recv(100) == b"answer"
            assert tcp_info(client)[:2] == tcp_info(server)[:2] == (0, 0)
        assert stage.counters().spliced_bytes == 1300
