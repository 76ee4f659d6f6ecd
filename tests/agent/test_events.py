"""The event file: bounded, whole, followed across its change, readable after a killed writer."""

import itertools
import json
import multiprocessing
import os
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from sockhop.agent.events import Event, EventKind, EventLog, events_path
from sockhop.errors import SystemLackError
from tests.sandbox import SOCKHOP, wait_until

pytestmark = pytest.mark.unit


def event(cookie: int = 1, **fields: object) -> Event:
    return Event(1.5, EventKind.SEVERED, "removed from web", cookie=cookie, **fields)  # type: ignore[arg-type]


def cookies(events: Iterator[Event]) -> list[int]:
    return [each.cookie for each in events]


def test_events_are_kept(tmp_path: Path) -> None:
    path = events_path(tmp_path / "run" / "api.sock")
    assert path.name == "api.events"
    log = EventLog(path)
    assert list(log.read()) == []
    log.append([])
    assert not path.exists()
    log.append([event(1), event(2, processes=["curl/7"])])
    log.append([event(1, change=7)])
    again = EventLog(path)
    assert cookies(again.read()) == [1, 2, 1]
    assert [each.change for each in again.of_socket(1)] == [0, 7]
    assert path.stat().st_mode & 0o777 == 0o600


def test_the_oldest_go(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "api.events", file_max=1000)
    for number in range(1, 101):
        log.append([event(number)])
    found = cookies(log.read())
    assert found == list(range(found[0], 101))
    assert 10 < len(found) < 40
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 2200


@pytest.mark.parametrize("tail", [b'{"time":1', b"\xff\n", b"null\n{}\n"])
def test_a_damaged_line_costs_only_itself(tmp_path: Path, tail: bytes) -> None:
    log = EventLog(tmp_path / "api.events")
    log.append([event(1)])
    with log.path.open("ab") as file:
        file.write(tail)
    log.append([event(2)])
    assert cookies(log.read()) == [1, 2]


def write(path: Path, first: int) -> None:
    log = EventLog(path, file_max=60_000)
    for number in range(first, first + 200):
        log.append([event(number), event(number)])


def test_writers_at_once_lose_nothing(tmp_path: Path) -> None:
    """Three processes append while the file changes hands once; each line is whole."""
    path = tmp_path / "api.events"
    fork = multiprocessing.get_context("fork")
    writers = [fork.Process(target=write, args=(path, first)) for first in (1000, 2000, 3000)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(30)
        assert writer.exitcode == 0
    assert (tmp_path / "api.events.1").exists()
    found = cookies(EventLog(path).read())
    for first in (1000, 2000, 3000):
        mine = [number for number in found if first <= number < first + 1000]
        assert mine == sorted([*range(first, first + 200)] * 2)


def test_following(tmp_path: Path) -> None:
    """From the first event, through a line in two parts and a change of the file."""
    log = EventLog(tmp_path / "api.events", file_max=400)
    seen: list[int] = []

    def follow() -> None:
        for each in itertools.islice(log.follow(2), 12):
            seen.append(each.cookie)

    log.append([event(number) for number in (1, 2, 3)])
    follower = threading.Thread(target=follow, daemon=True)
    follower.start()
    wait_until(lambda: seen == [2, 3], "the last two")
    for number in range(4, 13):
        log.append([event(number)])
        wait_until(lambda n=number: seen[-1] == n, f"event {number}")  # type: ignore[misc]
    whole = b'{"time":2,"kind":"parked","reason":"","cookie":13}\n'
    for part in (whole[:20], whole[20:]):
        with log.path.open("ab") as file:
            file.write(part)
    wait_until(lambda: seen[-1] == 13, "the last")
    assert seen == list(range(2, 14))
    follower.join(5)
    assert not follower.is_alive()


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SystemLackError, match="File exists"):
        EventLog(tmp_path / "file" / "api.events").append([event()])


def sockhop(tmp_path: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    environment = os.environ | {"SOCKHOP_API": str(tmp_path / "api.sock")}
    return subprocess.run(
        [SOCKHOP, "events", *arguments],
        env=environment, capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip


def test_the_command(tmp_path: Path) -> None:
    none = sockhop(tmp_path)
    assert (none.returncode, none.stdout) == (1, "")
    assert "there are no events in" in none.stderr
    log = EventLog(tmp_path / "api.events")
    ended = event(
        41, change=7, intent="sever", protocol="TCP", local="10.0.0.2:4312", remote="10.1.0.2:53",
        processes=["curl/123"], netns=4026532177,
    )  # fmt: skip
    log.append([event(40), ended, Event(2.0, EventKind.HELD, "too many", change=8, sockets=1234)])
    assert sockhop(tmp_path, "-n", "2").stdout.splitlines() == [
        "1970-01-01T00:00:01.500Z severed tcp 10.0.0.2:4312>10.1.0.2:53 of curl/123: "
        "removed from web, sever, change 7",
        "1970-01-01T00:00:02.000Z held: too many, change 8, 1,234 sockets",
    ]
    assert "(cookie 41, netns 4026532177)" in sockhop(tmp_path, "-o", "wide").stdout
    rows = json.loads(sockhop(tmp_path, "-o", "json").stdout)
    assert [row.get("cookie") for row in rows] == [40, 41, None]
    assert rows[1]["kind"] == "severed"
    assert sockhop(tmp_path, "-n", "0", "-o", "json").stdout == "[]\n"


def test_the_command_follows(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "api.events")
    log.append([event(1)])
    environment = os.environ | {"SOCKHOP_API": str(tmp_path / "api.sock")}
    with subprocess.Popen(
        [SOCKHOP, "events", "-f", "-o", "json"], env=environment, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert json.loads(process.stdout.readline())["cookie"] == 1
        log.append([event(2)])
        assert json.loads(process.stdout.readline())["cookie"] == 2
        process.kill()
