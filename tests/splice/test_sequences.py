"""However a connection ends, spliced or not: the ends see the same, and so does the next one."""

from functools import cache
from pathlib import Path

import pytest

from sockhop.datapath.vanilla import vanilla
from tests.mutants import mutant
from tests.splice.runs import Seen, misdelivered, run_all
from tests.splice.sequences import SEQUENCES, UNREAD
from tests.splice.stage import Place, Stage

pytestmark = pytest.mark.kernel

ONE = (Place.LOOPBACK4,)


@cache
def plain() -> Seen:
    """Return what plain TCP shows."""
    with Stage(spliced=False) as stage:
        seen = run_all(stage, SEQUENCES, Place)
    assert not [name for name, lines in seen.items() if misdelivered(lines)]
    for place in Place:
        assert "there were bytes in the SYN" in seen[place, "fast_open"]
    return seen


def expected() -> Seen:
    """Return what spliced connections should show."""
    return {
        (place, name): list(UNREAD.get(name, lines)) for (place, name), lines in plain().items()
    }


def test_spliced_connections_end_as_plain_ones() -> None:
    with Stage() as stage:
        seen = run_all(stage, SEQUENCES, Place)
        counters = stage.counters()
        left = stage.entries()
    assert seen == expected()
    # Two connections each, but one where the tuple is still in use afterwards.
    assert counters.pairs >= 2 * len(seen) - len(Place)
    assert counters.spliced_bytes > 4000 * len(Place)
    assert not left


def test_a_sockhash_by_tuple_delivers_to_the_dead() -> None:
    with Stage(spliced=False) as stage, vanilla(stage.sandbox.cgroup):
        seen = {name: lines for (_, name), lines in run_all(stage, SEQUENCES, ONE).items()}
    stuck = {name for name, lines in seen.items() if misdelivered(lines)}
    assert stuck == {
        "client_resets",
        "server_resets",
        "client_resets_behind_unread",
        "server_resets_behind_unread",
        "client_closes_unread",
        "server_closes_unread",  # the old end keeps the tuple
        "listener_closes_over_unaccepted",
        "client_half_then_server",
        "server_half_then_client",
        "client_unconnects",
        "server_unconnects",
        "client_writes_after_shutdown",
    }
    assert "client reads b'of the old peer'" in seen["client_goes_elsewhere"]


STATES = (
    "	if (peer.state != TCP_ESTABLISHED && peer.state != TCP_FIN_WAIT1 &&\n"
    "	    peer.state != TCP_FIN_WAIT2)\n"
)

MUTANTS = {
    "keeps the entry of the connection before": (
        {"	count_spliced(old);\n	bpf_map_delete_elem(&splice_sockets, &cookie);\n": ""},
        {"client_goes_elsewhere", "server_goes_elsewhere"},
    ),
    "drops the entry at the end, whatever is unread": (
        {
            "	if (!psock || queue_is_empty(psock))\n		bpf_map": "	if (1)\n		bpf_map"
        },
        {"client_resets_behind_unread", "client_destroyed", "server_destroyed"},
    ),
    "keeps the entry at the end, though nothing is unread": (
        {
            "	if (!psock || queue_is_empty(psock))\n		bpf_map": "	if (0)\n		bpf_map"
        },
        {"client_unconnects", "server_unconnects"},
    ),
    "sends after shutdown": (
        {
            "	if (sk->sk_shutdown & SEND_SHUTDOWN)\n		return SPLICE_SHUT;\n": "",
            "	if (tp->write_seq != lane->sequence)\n		return SPLICE_SENT_BEFORE;\n": "",
            STATES: "	if (0)\n",
        },
        {"client_writes_after_shutdown", "server_writes_after_shutdown"},
    ),
}


@pytest.mark.parametrize("what", MUTANTS)
def test_a_mutant_is_noticed(what: str, tmp_path: Path) -> None:
    changes, broken = MUTANTS[what]
    with Stage(path=mutant(tmp_path, "splice", *changes.items())) as stage:
        concerned = [each for each in SEQUENCES if each.__name__[1:] in broken]
        seen = run_all(stage, concerned, ONE)
    wanted = expected()
    differs = {name for (place, name), lines in seen.items() if lines != wanted[place, name]}
    assert differs == broken
