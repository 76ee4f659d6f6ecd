"""FileSource: what it says is what a fresh reading says, and it reads only what differs."""

import json
import os
import random
import shutil
import socket
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from sockhop.errors import InputError
from sockhop.sources import files
from sockhop.sources.files import FileSource, Loaded, load
from sockhop.sources.parts import Part, read_part
from sockhop.sources.paths import FileStamp, list_manifests, look_at, read_bytes
from sockhop.sources.watch import FileWatcher
from tests.sources.manifests import compact, endpoint_slice, service
from tests.sources.test_files import named
from tests.sources.test_watch import changed

pytestmark = pytest.mark.unit


def publish(path: Path, text: str) -> None:
    path.with_name(".new").write_text(text)
    path.with_name(".new").rename(path)


def numbered(number: int, backend: str = "10.9.0.1:80") -> str:
    frontend = f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}:80"
    return json.dumps(compact(name=f"s{number:05}", frontends=[frontend], backends=[backend]))


def fill(directory: Path, count: int) -> list[Path]:
    paths = [directory / f"{number:05}.json" for number in range(1, count + 1)]
    for number, path in enumerate(paths, 1):
        path.write_text(numbered(number))
    return paths


def outcome(read: Callable[[], Loaded]) -> Loaded | str:
    try:
        return read()
    except InputError as error:
        return str(error)


def differing(before: Loaded, after: Loaded) -> set[str]:
    """Names of the services that are not the same object."""
    old = {found.name: found for found in before.desired.services}
    new = {found.name: found for found in after.desired.services}
    return {name for name in old.keys() | new.keys() if old.get(name) is not new.get(name)}


@pytest.mark.parametrize("hinted", [False, True])
def test_what_is_as_before_is_the_same_object(tmp_path: Path, hinted: bool) -> None:
    paths = fill(tmp_path, 5)
    source = FileSource([tmp_path])
    before = source.load()
    assert source.load() is before
    assert source.load([]) is before

    def look(*touched: Path) -> Loaded:
        return source.load(touched if hinted else None)

    publish(paths[1], numbered(2, "10.9.0.2:80"))
    after = look(paths[1])
    assert differing(before, after) == {"s00002"}
    publish(paths[1], numbered(2, "10.9.0.2:80") + "\n")
    assert look(paths[1]) is after
    both = json.loads(numbered(2, "10.9.0.2:80"))
    both["services"] += json.loads(numbered(77))["services"]
    publish(paths[1], json.dumps(both))
    with_another = look(paths[1])
    assert differing(after, with_another) == {"s00077"}
    paths[1].unlink()
    paths[3].unlink()
    assert differing(with_another, look(paths[1], paths[3])) == {"s00002", "s00004", "s00077"}
    publish(tmp_path / "new.yaml", numbered(9))
    assert look(tmp_path / "new.yaml") == load([tmp_path])


def test_a_kubernetes_service_is_joined_again_when_one_of_its_slices_differs(
    tmp_path: Path,
) -> None:
    for name, cluster_ip in (("one", "10.96.0.1"), ("two", "10.96.0.2")):
        echo = service(name, clusterIP=cluster_ip)
        (tmp_path / f"{name}.json").write_text(json.dumps(echo))
        part = endpoint_slice("10.1.0.1", name=f"{name}-1", owner=name)
        (tmp_path / f"{name}-1.json").write_text(json.dumps(part))
    source = FileSource([tmp_path])
    before = source.load()
    assert [found.name for found in before.desired.services] == ["test/one", "test/two"]
    publish(
        tmp_path / "two-1.json",
        json.dumps(endpoint_slice("10.1.0.2", name="two-1", owner="two")),
    )
    after = source.load([tmp_path / "two-1.json"])
    assert differing(before, after) == {"test/two"}
    moved = {"addresses": ["10.1.0.2"], "nodeName": "elsewhere"}
    publish(tmp_path / "two-1.json", json.dumps(endpoint_slice(moved, name="two-1", owner="two")))
    assert differing(after, source.load()) == set()
    (tmp_path / "one-1.json").unlink()
    assert differing(after, source.load([tmp_path / "one-1.json"])) == {"test/one"}
    assert source.load() == load([tmp_path])


def test_after_an_error_nothing_is_forgotten(tmp_path: Path) -> None:
    paths = fill(tmp_path, 4)
    source = FileSource([tmp_path])
    before = source.load()
    publish(paths[0], "{")
    publish(paths[2], numbered(3, "10.9.0.3:80"))
    for touched in ([paths[2], paths[0]], [], [paths[3]], None):
        with pytest.raises(InputError, match=r"00001\.json.*not JSON"):
            source.load(touched)
    publish(paths[0], numbered(1))
    assert differing(before, source.load([])) == {"s00003"}
    publish(paths[0], numbered(2))
    for touched in ([paths[0]], [], None):
        with pytest.raises(InputError, match="expected a name of its own"):
            source.load(touched)
    publish(paths[0], numbered(1))
    assert source.load([]) == load([tmp_path])


def test_the_place_of_another_file_is_named_from_that_file(tmp_path: Path) -> None:
    first, second = tmp_path / "a.yaml", tmp_path / "b.yaml"
    first.write_text(named("a"))
    second.write_text(named("b", "10.0.0.2:80"))
    source = FileSource([tmp_path])
    source.load()
    second.write_text(f"\n\n{named('a', '10.0.0.2:80')}")
    with pytest.raises(InputError) as caught:
        source.load([second])
    assert str(caught.value).replace(f"{tmp_path}/", "") == (
        "b.yaml:3: services[0].name: found 'a', which is at a.yaml:1: services[0].name too, "
        "expected a name of its own"
    )


def test_a_path_that_is_given_twice_is_read_once(tmp_path: Path) -> None:
    (path,) = fill(tmp_path, 1)
    assert len(load([path, tmp_path, path, tmp_path]).desired.services) == 1


def test_touched_files_that_are_no_manifests_of_a_directory(tmp_path: Path) -> None:
    paths = fill(tmp_path, 2)
    (tmp_path / "sub").mkdir()
    source = FileSource([paths[0], tmp_path / "sub" / ".." / "00002.json"])
    source.load()
    (tmp_path / "notes.txt").write_text(numbered(9))
    for path in (paths[1], tmp_path / "notes.txt", tmp_path / "sub" / "x.yaml", Path("x.yaml")):
        publish(paths[0], numbered(1, f"10.9.0.{len(path.name)}:80"))
        assert source.load([path]) == load([tmp_path])
    source = FileSource([tmp_path])
    before = source.load()
    assert source.load([tmp_path / "notes.txt", tmp_path / "sub"]) is before


def test_a_directory_that_becomes_empty(tmp_path: Path) -> None:
    (path,) = fill(tmp_path, 1)
    source = FileSource([tmp_path])
    source.load()
    path.unlink()
    with pytest.raises(InputError, match="found no manifest in the directory"):
        source.load([path])


def test_a_file_that_goes_while_the_directory_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_path, 2)
    found = load([tmp_path])

    def list_and_remove(path: str) -> list[str] | None:
        names = list_manifests(path)
        (tmp_path / "gone.yaml").unlink()
        return names

    monkeypatch.setattr(files, "list_manifests", list_and_remove)
    (tmp_path / "gone.yaml").write_text("{")
    assert load([tmp_path]) == found


def coarse(path: str) -> FileStamp | None:
    """A file system that knows every other second only, and one size of all files."""
    stamp = look_at(path)
    if stamp is None:
        return None
    floor = stamp.changed - stamp.changed % 2_000_000_000
    return FileStamp(stamp.device, 1, 1, floor, floor)


def test_files_that_change_within_a_tick_of_the_clock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "look_at", coarse)
    (path,) = fill(tmp_path, 1)
    source = FileSource([tmp_path])
    source.load()
    for number in range(2, 9):
        path.write_text(numbered(1, f"10.9.0.{number}:80"))
        assert source.load([path]).desired.services[0].frontends[0].backends[0].address == (
            f"10.9.0.{number}"
        )


def test_files_that_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []

    def note(path: str, before: Part | None) -> Part:
        read.append(path)
        return read_part(path, before)

    monkeypatch.setattr(files, "read_part", note)
    paths = fill(tmp_path, 3)
    time.sleep(0.05)  # more than a tick
    source = FileSource([tmp_path])
    source.load()
    assert read == [str(path) for path in paths]
    read.clear()
    source.load()
    source.load(paths)
    assert read == []
    stat = paths[1].stat()
    paths[1].write_text(paths[1].read_text().replace("10.9.0.1", "10.9.0.2"))
    os.utime(paths[1], ns=(stat.st_atime_ns, stat.st_mtime_ns))  # as cp -p does
    source.load()
    assert read == [str(paths[1])]


def test_one_change_among_many_files_is_cheap(tmp_path: Path) -> None:
    paths = fill(tmp_path, 3000)

    def seconds(read: Callable[[], object]) -> float:
        begin = time.process_time()
        read()
        return time.process_time() - begin

    cold = min(seconds(FileSource([tmp_path]).load) for _ in range(3))
    source = FileSource([tmp_path])
    source.load()
    hinted = []
    for number in range(2, 7):
        publish(paths[1500], numbered(1501, f"10.9.0.{number}:80"))
        hinted.append(seconds(lambda: source.load([paths[1500]])))
    assert min(hinted) < cold / 8


def test_what_is_gone_takes_no_memory(tmp_path: Path) -> None:
    source = FileSource([tmp_path])
    backends = [f"10.1.0.{number}:80" for number in range(1, 200)]

    def rounds(start: int) -> int:
        """Replace all files ten times; return what that leaves allocated."""
        for number in range(start, start + 10):
            for path in tmp_path.iterdir():
                path.unlink()
            for kind in range(3):
                publish(
                    tmp_path / f"{number}-{kind}.json",
                    json.dumps(compact(name=f"s{number}-{kind}", backends=backends,
                                       frontends=[f"10.0.{kind}.{number}:80"])),
                )  # fmt: skip
            source.load()
            publish(tmp_path / "broken.json", "{")
            with pytest.raises(InputError):
                source.load()
            (tmp_path / "broken.json").unlink()
        return tracemalloc.get_traced_memory()[0]

    tracemalloc.start()
    try:
        first = rounds(10)
        assert rounds(20) < first + 50_000
    finally:
        tracemalloc.stop()


def test_files_that_come_and_go_take_no_memory(tmp_path: Path) -> None:
    fill(tmp_path, 1)
    source = FileSource([tmp_path])
    source.load()
    backends = [f"10.1.0.{number}:80" for number in range(1, 200)]

    def rounds(start: int) -> int:
        for number in range(start, start + 10):
            path = tmp_path / f"{number}.json"
            path.write_text(
                json.dumps(compact(name=f"x{number}", frontends=["10.7.0.1:80"], backends=backends))
            )
            source.load([path])
            path.unlink()
            source.load([path])
        return tracemalloc.get_traced_memory()[0]

    tracemalloc.start()
    try:
        first = rounds(10)
        assert rounds(20) < first + 50_000
    finally:
        tracemalloc.stop()


def test_a_pipe_in_the_place_of_a_file_does_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "m.yaml")
    begin = time.monotonic()
    assert read_bytes(f"{tmp_path}/m.yaml") == b""
    assert time.monotonic() - begin < 2


@pytest.mark.parametrize("listed", [False, True])
@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (os.mkfifo, "a pipe"),
        (lambda path: socket.socket(socket.AF_UNIX).bind(os.fspath(path)), "a socket"),
        (lambda path: path.symlink_to("/dev/null"), "a device"),
        (lambda path: path.symlink_to("/dev/tty"), "a device"),
    ],
    ids=["pipe", "socket", "null", "tty"],
)
@pytest.mark.filterwarnings("ignore:unclosed <socket")
def test_what_is_no_file(
    tmp_path: Path, make: Callable[[Path], None], kind: str, listed: bool
) -> None:
    path = tmp_path / "m.yaml"
    make(path)
    begin = time.monotonic()
    with pytest.raises(InputError) as caught:
        load([tmp_path if listed else path])
    assert time.monotonic() - begin < 2
    assert f"{path}: found {kind}, expected a file or a directory\n" in str(caught.value)


class Life:
    """A directory of manifests that lives at random."""

    def __init__(self, home: Path, chance: random.Random) -> None:
        self._home = home
        self._chance = chance
        self._step = 0
        home.mkdir()
        publish(home / "0.json", self._text())

    def go_on(self) -> None:
        """Do one thing, most often to one of eight files."""
        self._step += 1
        path = self._home / f"{self._chance.randrange(8)}.json"
        action = self._chance.randrange(10)
        if action < 3:
            path.unlink(missing_ok=True)
            path.write_text(self._text())
        elif action < 6:
            publish(path, self._text())
        elif action == 6:
            path.unlink(missing_ok=True)
        elif action == 7:
            self._link(path)
        elif action == 8:
            other = self._home / f"{self._chance.randrange(8)}.json"
            if path.exists():
                path.rename(other)
        else:
            self._replace_directory()

    def _link(self, path: Path) -> None:
        """Make *path* a link to a hidden file, or change what it leads to."""
        target = self._home / f".real{self._chance.randrange(2)}"
        target.write_text(self._text())
        if self._chance.random() < 0.7:
            path.unlink(missing_ok=True)
            path.symlink_to(target.name)

    def _replace_directory(self) -> None:
        aside = self._home.with_name("aside")
        shutil.copytree(self._home, aside, symlinks=True)
        shutil.rmtree(self._home)
        aside.rename(self._home)

    def _text(self) -> str:
        number = self._chance.randrange(12)
        backend = f"10.9.{self._step >> 8}.{self._step & 255}"
        choice = self._chance.random()
        if choice < 0.04:
            return "{"
        if choice < 0.5:
            text = numbered(number, f"{backend}:80")
            return text if choice < 0.4 else text.replace("version", "versio")
        owner = f"echo-{number}"
        if choice < 0.75:
            cluster_ip = f"10.96.0.{self._chance.randint(1, 9)}"
            return json.dumps(service(owner, clusterIP=cluster_ip))
        name = f"part-{self._chance.randrange(4)}"
        return json.dumps(endpoint_slice(backend, name=name, owner=owner))


def test_a_random_life(tmp_path: Path) -> None:
    """After each step: by the watcher's word, or by looking, the same as read for the first time.

    Errors too are the same.
    """
    seed = int(os.environ.get("SOCKHOP_TEST_SEED", random.SystemRandom().randrange(1 << 32)))
    print(f"SOCKHOP_TEST_SEED={seed}")
    chance = random.Random(seed)
    home = tmp_path / "home"
    life = Life(home, chance)
    looking, told = FileSource([home]), FileSource([home])
    good = hinted = 0
    with FileWatcher([home]) as watcher:
        for step in range(800):
            for _ in range(chance.randint(1, 3)):
                life.go_on()
            changed(watcher)
            touched = watcher.take_touched()
            hinted += touched is not None
            fresh = outcome(lambda: load([home]))
            assert outcome(looking.load) == fresh, f"step {step}"
            assert outcome(lambda: told.load(touched)) == fresh, f"step {step}"  # noqa: B023
            good += isinstance(fresh, Loaded)
    print(f"{good} good, {hinted} with hints")
    assert good > 80
    assert hinted > 250
