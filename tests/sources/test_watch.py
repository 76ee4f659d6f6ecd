"""The watcher on real files: it says so of every change, and of nothing else."""

import os
import random
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from sockhop.errors import InputError
from sockhop.sources.files import load
from sockhop.sources.watch import FileWatcher
from tests.sources.test_files import named

pytestmark = pytest.mark.unit


def changed(watcher: FileWatcher) -> bool:
    """Whether the watcher reports a change of what was done before (inotify is at once)."""
    told = False
    while select.select([watcher], [], [], 0)[0]:
        told |= watcher.changed()
    assert not watcher.changed()
    return told


@pytest.fixture
def home(tmp_path: Path) -> Path:
    path = tmp_path / "etc" / "sockhop"
    path.mkdir(parents=True)
    return path


def write(path: Path, text: str = "x") -> None:
    path.write_text(text)


def replace(path: Path) -> None:
    aside = path.with_name(".aside")
    aside.write_text("y")
    aside.rename(path)


def append(path: Path) -> None:
    with path.open("a") as file:
        file.write("more")


def recreate(path: Path) -> None:
    path.unlink()
    path.write_text("z")


def make_unreadable(path: Path) -> None:
    path.chmod(0)


def rename_away_and_back(path: Path) -> None:
    path.rename(path.with_name("away"))
    path.with_name("away").rename(path)


def replace_its_directory(path: Path) -> None:
    aside = path.parent.with_name("aside")
    shutil.copytree(path.parent, aside)
    path.parent.rename(path.parent.with_name("old"))
    aside.rename(path.parent)


CHANGES: list[Callable[[Path], None]] = [
    write, replace, append, recreate, os.unlink, make_unreadable, rename_away_and_back,
    replace_its_directory,
]  # fmt: skip


@pytest.mark.parametrize("as_directory", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_every_change_is_seen_again_and_again(
    home: Path, change: Callable[[Path], None], as_directory: bool
) -> None:
    path = home / "m.yaml"
    write(path)
    with FileWatcher([home if as_directory else path]) as watcher:
        assert not changed(watcher)
        for _ in range(3):
            change(path)
            assert changed(watcher)
            if not path.exists():
                write(path)
                assert changed(watcher)
            shutil.rmtree(home.with_name("old"), ignore_errors=True)
            changed(watcher)
            append(path)
            assert changed(watcher)


def test_files_in_a_directory_are_told_apart(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(home / "a.yaml")
    (home / "link").symlink_to(".")
    monkeypatch.chdir(home.parent)
    directories = [Path("sockhop"), home / "link"]
    with FileWatcher(directories) as watcher:
        assert watcher.take_touched() is None
        assert watcher.take_touched() == frozenset()

        def expected(*names: str) -> frozenset[Path]:
            return frozenset(directory / name for directory in directories for name in names)

        def touched(*names: str) -> bool:
            assert changed(watcher) == bool(names)
            return watcher.take_touched() == expected(*names)

        append(home / "a.yaml")
        assert touched("a.yaml")
        replace(home / "b.json")
        recreate(home / "a.yaml")
        assert touched("a.yaml", "b.json")
        (home / "b.json").rename(home / "c.yml")
        assert touched("b.json", "c.yml")
        (home / "c.yml").unlink()
        assert touched("c.yml")
        write(home / "notes.txt")
        assert touched()
        write(home / "d.yaml")
        changed(watcher)
        write(home / "e.yaml")
        assert changed(watcher)
        assert watcher.take_touched() == expected("d.yaml", "e.yaml")


def test_links_and_directories_can_be_anything(home: Path) -> None:
    (home / ".real").write_text("x")
    with FileWatcher([home, home / "named.yaml"]) as watcher:

        def anything() -> bool:
            assert changed(watcher)
            return watcher.take_touched() is None

        watcher.take_touched()
        (home / "a.yaml").symlink_to(".real")
        assert anything()
        append(home / ".real")
        assert anything()
        (home / "a.yaml").unlink()
        assert anything()
        write(home / "a.yaml")
        assert changed(watcher)
        assert watcher.take_touched() == frozenset([home / "a.yaml"])
        write(home / "named.yaml")
        assert anything()
        home.chmod(0o700)
        assert anything()
        append(home / "a.yaml")
        replace_its_directory(home / "a.yaml")
        assert anything()
        append(home / "a.yaml")
        assert changed(watcher)
        assert watcher.take_touched() == frozenset([home / "a.yaml"])


def test_ten_thousand_files_take_one_watch_and_no_time(home: Path) -> None:
    for number in range(10_000):
        (home / f"{number}.yaml").touch()

    def seconds(act: Callable[[], object]) -> float:
        begin = time.process_time()
        act()
        return time.process_time() - begin

    listing = min(seconds(lambda: os.listdir(home)) for _ in range(5))
    with FileWatcher([home]) as watcher:
        info = Path(f"/proc/self/fdinfo/{watcher.fileno()}").read_text()
        assert info.count("inotify wd:") == len(home.parts)
        taken = []
        for number in range(5):
            replace(home / f"{number}.yaml")
            taken.append(seconds(lambda: changed(watcher)))
        assert min(taken) < listing / 4


def test_what_is_nobody_s_business_is_not_reported(home: Path) -> None:
    path = home / "m.yaml"
    write(path)
    with FileWatcher([path]) as watcher:
        write(home / "other.yaml")
        recreate(home / "other.yaml")
        write(home.parent / "m.yaml")
        (home / "d").mkdir()
        path.read_text()
        assert not changed(watcher)
    with FileWatcher([home]) as watcher:
        write(home / "notes.txt")
        write(home / ".m.yaml.new")
        write(home / "m.yaml~")
        write(home.parent / "m.yaml")
        with pytest.raises(InputError):
            load([home])
        assert not changed(watcher)


def test_files_come_to_a_directory_and_leave_it(home: Path) -> None:
    with FileWatcher([home]) as watcher:
        for name in ("a.yaml", "b.yml", "c.json"):
            write(home / name)
            assert changed(watcher)
            (home / name).unlink()
            assert changed(watcher)
        (home.parent / "d.yaml").write_text("x")
        (home.parent / "d.yaml").rename(home / "d.yaml")
        assert changed(watcher)
        (home / "d.yaml").rename(home.parent / "d.yaml")
        assert changed(watcher)


@pytest.mark.parametrize("as_directory", [False, True])
def test_a_path_that_comes_later(tmp_path: Path, as_directory: bool) -> None:
    path = tmp_path / "a" / "b" / "c" / "m.yaml"
    with FileWatcher([path.parent if as_directory else path]) as watcher:
        assert not changed(watcher)
        for _ in range(3):
            path.parent.mkdir(parents=True)
            assert changed(watcher)
            write(path)
            assert changed(watcher)
            append(path)
            assert changed(watcher)
            shutil.rmtree(tmp_path / "a")
            assert changed(watcher)


def test_a_relative_path(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)
    with FileWatcher([Path("m.yaml"), Path("../sockhop/n.yaml")]) as watcher:
        write(home / "m.yaml")
        assert changed(watcher)
        write(home / "n.yaml")
        assert changed(watcher)


@pytest.mark.parametrize("absolute", [False, True])
def test_a_chain_of_links(home: Path, absolute: bool) -> None:
    base = home if absolute else Path()
    (home / "one").mkdir()
    (home / "two").mkdir()
    write(home / "one" / "real.yaml")
    write(home / "two" / "real.yaml")
    (home / "current").symlink_to(base / "one")
    (home / "m.yaml").symlink_to(base / "current" / "real.yaml")
    with FileWatcher([home / "m.yaml"]) as watcher:
        append(home / "one" / "real.yaml")
        assert changed(watcher)
        append(home / "two" / "real.yaml")
        assert not changed(watcher)
        (home / ".current").symlink_to(base / "two")
        (home / ".current").rename(home / "current")
        assert changed(watcher)
        append(home / "two" / "real.yaml")
        assert changed(watcher)
        append(home / "one" / "real.yaml")
        assert not changed(watcher)


def test_links_that_lead_nowhere_or_in_a_circle(home: Path) -> None:
    (home / "loop.yaml").symlink_to("loop.yaml")
    (home / "self.yaml").symlink_to(".")
    (home / "m.yaml").symlink_to("nowhere.yaml")
    with FileWatcher([home, home / "loop.yaml", home / "m.yaml", Path("a\0b")]) as watcher:
        assert not changed(watcher)
        write(home / "nowhere.yaml")
        assert changed(watcher)


def configmap(home: Path, name: str, text: str) -> None:
    """Write a version of a volume and swap it in, as kubelet's AtomicWriter does."""
    version = home / name
    version.mkdir()
    write(version / "m.yaml", text)
    old = os.readlink(home / "..data") if (home / "..data").is_symlink() else None
    (home / "..data_tmp").symlink_to(name)
    (home / "..data_tmp").rename(home / "..data")
    if not (home / "m.yaml").is_symlink():
        (home / "m.yaml").symlink_to("..data/m.yaml")
    if old:
        shutil.rmtree(home / old)


@pytest.mark.parametrize("as_directory", [False, True])
def test_a_configmap_volume(home: Path, as_directory: bool) -> None:
    configmap(home, "..v0", named("v0"))
    path = home if as_directory else home / "m.yaml"
    with FileWatcher([path]) as watcher:
        for number in range(1, 6):
            configmap(home, f"..v{number}", named(f"v{number}"))
            assert changed(watcher)
            assert load([path]).desired.services[0].name == f"v{number}"


def test_a_file_that_is_written_under_another_name(home: Path, tmp_path: Path) -> None:
    path, other = home / "m.yaml", tmp_path / "other"
    write(path)
    other.hardlink_to(path)
    with FileWatcher([path]) as watcher:
        append(other)
        assert changed(watcher)


def test_a_change_that_the_full_queue_lost(home: Path) -> None:
    limit = int(Path("/proc/sys/fs/inotify/max_queued_events").read_text())
    if limit > 100_000:
        pytest.skip(f"the queue holds {limit} events")
    others = [home / "a.txt", home / "b.txt"]
    with FileWatcher([home]) as watcher:
        for number in range(limit // 2 + 10):
            append(others[number % 2])  # equal events in a row count once
        write(home / "m.yaml")
        assert changed(watcher)
        write(home / "c.yaml")
        assert changed(watcher)


def test_watches_do_not_pile_up(home: Path) -> None:
    path = home / "m.yaml"
    with FileWatcher([path]) as watcher:

        def count() -> int:
            info = Path(f"/proc/self/fdinfo/{watcher.fileno()}").read_text()
            return info.count("inotify wd:")

        write(path)
        changed(watcher)
        before = count()
        for number in range(5):
            home.rename(home.with_name(f"old{number}"))
            home.mkdir()
            write(path)
            assert changed(watcher)
        assert count() == before


def test_no_descriptor_is_left_open(home: Path) -> None:
    before = os.listdir("/proc/self/fd")
    with FileWatcher([home]) as watcher:
        assert not os.get_inheritable(watcher.fileno())
    watcher.close()
    assert os.listdir("/proc/self/fd") == before


LIMITED = """\
import ctypes, pathlib, sys
from sockhop.errors import SystemLackError
from sockhop.sources.watch import FileWatcher
if ctypes.CDLL(None).unshare(0x10000000):  # CLONE_NEWUSER: limits of its own
    sys.exit(77)
try:
    pathlib.Path("/proc/sys/user", sys.argv[1]).write_text(sys.argv[2])
except OSError:
    sys.exit(77)
try:
    FileWatcher([pathlib.Path(sys.argv[3])])
except SystemLackError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("limit", "value", "step", "setting"),
    [
        ("max_inotify_instances", 0, "inotify_init1: Too many open files", "max_user_instances"),
        ("max_inotify_watches", 2, "inotify_add_watch on ", "max_user_watches"),
    ],
)
def test_what_the_kernel_does_not_give(
    home: Path, limit: str, value: int, step: str, setting: str
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, limit, str(value), str(home)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode == 77:
        pytest.skip("no user namespaces with limits of their own here")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"cannot watch manifests: {step}")
    assert f"raise fs.inotify.{setting} with sysctl" in done.stdout


def live(home: Path, chance: random.Random, step: int) -> None:
    """Do something to a directory with m.yaml in it, or to what m.yaml may link to."""
    path, target = home / "m.yaml", home / f"real{chance.randrange(3)}.yaml"
    action = chance.randrange(6)
    if action == 0:
        write(path, named(f"s{step}"))
    elif action == 1:
        write(home / ".new", named(f"s{step}"))
        (home / ".new").rename(path)
    elif action == 2:
        path.unlink(missing_ok=True)
    elif action == 3:
        (home / ".new").symlink_to(target.name)
        (home / ".new").rename(path)
    elif action == 4:
        write(target, named(f"t{step}"))
    else:
        old = home.with_name("old")
        home.rename(old)
        home.mkdir()
        kept = chance.choice([home, old])
        shutil.rmtree(old if kept is home else home)
        if kept is old:
            old.rename(home)


def test_a_random_life(home: Path) -> None:
    """Whatever happens: when load() gives another result, the watcher has said so."""
    seed = int(os.environ.get("SOCKHOP_TEST_SEED", random.SystemRandom().randrange(1 << 32)))
    print(f"SOCKHOP_TEST_SEED={seed}")
    chance = random.Random(seed)
    path = home / "m.yaml"

    def seen() -> str:
        try:
            return repr(load([path]))
        except InputError as error:
            return str(error)

    with FileWatcher([path]) as watcher:
        before = seen()
        for step in range(300):
            live(home, chance, step)
            told, now = changed(watcher), seen()
            assert told or now == before, f"step {step}"
            before = now
