"""`doctor --remote`: over a real ssh, with what goes wrong there, and behind other commands."""

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from sockhop.diagnose import remote
from sockhop.diagnose.causes import Cause
from sockhop.diagnose.dial import Question, Result
from sockhop.diagnose.remote import dial_remotely
from sockhop.errors import InputError
from sockhop.kernel import netns
from sockhop.model import pack_address
from tests.diagnose.invoke import sockhop
from tests.diagnose.load import SERVER, Server
from tests.diagnose.test_doctor import rules
from tests.sandbox import SOCKHOP, wait_until
from tests.splice.stage import Place, Stage

pytestmark = pytest.mark.kernel

BIN = Path(sys.executable).parent
WITH_SOCKHOP = ("env", f"PATH={BIN}:/usr/bin:/bin")
WITH_CURL = ("env", "PATH=/usr/bin:/bin")

PLAIN, NOISY, PASSWORD, NOBODY = 2201, 2202, 2203, 2204
SERVER_CONFIG = """
HostKey {at}/host
AuthorizedKeysFile {at}/user.pub
PidFile none
StrictModes no
UsePAM no
PermitRootLogin yes
KbdInteractiveAuthentication no
PasswordAuthentication no
Banner {at}/banner
ListenAddress {address}:{plain}
ListenAddress {address}:{noisy}
ListenAddress {address}:{password}
Match LocalPort {noisy}
    ForceCommand echo 'Welcome {{to}} node 0.1'; eval "$SSH_ORIGINAL_COMMAND"
Match LocalPort {password}
    PubkeyAuthentication no
    PasswordAuthentication yes
"""
CLIENT_CONFIG = """
HostName {address}
User root
IdentityFile {at}/user
IdentitiesOnly yes
StrictHostKeyChecking yes
UserKnownHostsFile {at}/known
GlobalKnownHostsFile none
"""


@pytest.fixture(scope="module")
def stage() -> Iterator[Stage]:
    with Stage(spliced=False) as made:
        yield made


class Sshd:
    """A server of ssh in the other namespace, with keys of its own, and the words that go there."""

    def __init__(self, stage: Stage, at: Path) -> None:
        self._at = at
        address = Place.VETH4.client
        ports = {"plain": PLAIN, "noisy": NOISY, "password": PASSWORD}
        for name in ("host", "user"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", at / name],
                           check=True)  # fmt: skip
        key = (at / "host.pub").read_text()
        (at / "known").write_text("".join(f"[{address}]:{port} {key}" for port in ports.values()))
        (at / "banner").write_text("Authorized use only: others are refused.\n")
        (at / "config").write_text(CLIENT_CONFIG.format(at=at, address=address))
        (at / "sshd").write_text(SERVER_CONFIG.format(at=at, address=address, **ports))
        Path("/run/sshd").mkdir(exist_ok=True)  # as its service does
        self._log = at / "log"
        with netns.entered(stage.other):
            self._process = subprocess.Popen(
                ["/usr/sbin/sshd", "-D", "-f", at / "sshd", "-E", self._log],
                stdin=subprocess.DEVNULL,
            )

    def __enter__(self) -> "Sshd":
        wait_until(
            lambda: self._log.exists() and self._log.read_text().count("Server listening") == 3,
            "sshd to listen",
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait(10)

    def words(self, *more: str, port: int = PLAIN, options: str = "") -> list[str]:
        """Return the command, without a terminal on which it could ask for something."""
        ssh = ("ssh", "-F", str(self._at / "config"), *options.split())
        return ["setsid", "-w", *ssh, "-p", str(port), "node", *more]


@pytest.fixture(scope="module")
def sshd(stage: Stage, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sshd]:
    with Sshd(stage, tmp_path_factory.mktemp("ssh")) as made:
        yield made


SOON = 0.5
"""Seconds, where nothing comes."""


def question(port: int, path: str = "/health", *, timeout: float = 10) -> Question:
    return Question(pack_address(SERVER), port, path, 1, timeout)


def asked(prefix: list[str], port: int, path: str = "/health", *, timeout: float = 10) -> Result:
    (result,) = dial_remotely(prefix, question(port, path, timeout=timeout)).results
    return result


@pytest.mark.parametrize(
    ("there", "port"),
    [(WITH_SOCKHOP, PLAIN), (WITH_SOCKHOP, NOISY), (WITH_CURL, NOISY)],
    ids=["sockhop", "sockhop, and a login script prints", "curl, and a login script prints"],
)
def test_over_ssh(stage: Stage, sshd: Sshd, there: tuple[str, ...], port: int) -> None:
    prefix = sshd.words(*there, port=port)
    with Server(stage) as server:
        row = dial_remotely(prefix, question(server.port))
        assert (row.results, row.failed, row.percent) == ({Result.ANSWERED: 1}, 0, 0)
        assert row.origin == f"remote ({shlex.join(prefix)})"
    with rules(stage.sandbox.netns, "input tcp dport 7 drop"):
        assert asked(prefix, 7, timeout=SOON) is Result.TIMEOUT


def test_ssh_does_not_get_there(sshd: Sshd) -> None:
    unknown = "-o UserKnownHostsFile=/dev/null"
    for prefix, said in (
        (sshd.words(port=PASSWORD), r"root@10\.77\.0\.2: Permission denied \(password\)\."),
        (sshd.words(options=unknown), r"Host key verification failed\."),
        (sshd.words(port=NOBODY), r"ssh: connect to .* port 2204: Connection refused"),
    ):
        with pytest.raises(InputError, match=f"it does not get there: {said}") as raised:
            dial_remotely(prefix, question(80))
        assert f"try `{shlex.join(prefix)} true`" in str(raised.value)


def test_a_remote_that_hangs(sshd: Sshd, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "_PATIENCE", 0.5)
    begin = time.monotonic()
    with pytest.raises(InputError, match=r"it has not ended within 2 s"):
        dial_remotely(sshd.words("sleep", "30;"), question(80, timeout=SOON))
    assert time.monotonic() - begin < 10


def test_what_a_user_sees_where_ssh_wants_a_password(stage: Stage, sshd: Sshd) -> None:
    """Nothing is read of what the user types for other programs, and nothing is dialled."""
    ours, theirs = os.pipe()
    with open(ours, "rb", closefd=True) as stdin, open(theirs, "wb", closefd=True) as typed:  # noqa: PTH123
        typed.write(b"secret\n")
        typed.flush()
        words = shlex.join(sshd.words(port=PASSWORD))
        told = stage.sandbox.run(
            *(str(SOCKHOP), "doctor", f"{SERVER}:7", "--remote", words),
            stdin=stdin,
            check=False,
        )
        typed.close()
        assert stdin.read() == b"secret\n"
    assert (told.returncode, told.stdout) == (2, "")
    assert "it does not get there: root@10.77.0.2: Permission denied (password)." in told.stderr


def afar(stage: Stage, *words: str) -> list[str]:
    """Return a command that runs another one in the other namespace, as ssh does elsewhere."""
    return ["nsenter", f"--net={stage.other}", *words]


def test_what_curl_says(stage: Stage) -> None:
    # A proxy is for browsers, and would answer for a server that is gone.
    proxies = [f"{each}=http://127.0.0.1:9" for each in ("http_proxy", "all_proxy", "ALL_PROXY")]
    prefix = afar(stage, *WITH_CURL, *proxies)
    for does, result in (
        ("answer", Result.ANSWERED),
        ("nothing", Result.SILENT),
        ("close", Result.CLOSED),
    ):
        with Server(stage, does) as server:
            silent = result is Result.SILENT
            assert asked(prefix, server.port, timeout=SOON if silent else 10) is result
            if result.is_good:
                assert asked(prefix, server.port, "") is Result.CONNECTED
    assert asked(prefix, 7) is Result.REFUSED


def test_a_remote_that_cannot() -> None:
    for prefix in (["env", "PATH=/nonexistent"], ["false"]):
        with pytest.raises(InputError, match="neither sockhop nor curl runs there"):
            dial_remotely(prefix, question(80))
    with pytest.raises(InputError, match="there is no command 'nowhere'"):
        dial_remotely(["nowhere"], question(80))


def test_only_the_remote_fails(stage: Stage) -> None:
    with (
        Server(stage) as server,
        rules(stage.sandbox.netns, f"input iifname near tcp dport {server.port} drop"),
        ExitStack() as stack,
    ):
        stack.enter_context(netns.entered(stage.sandbox.netns))
        options = ("--count", "2", "--timeout", "1s", "--http", "/health")
        remote = f"nsenter --net={stage.other} env PATH=/usr/bin:/bin"
        target = f"{SERVER}:{server.port}"
        told = sockhop(stage.sandbox, "doctor", target, *options, "--remote", remote, "-o", "json")
        assert told.returncode == 1
        found = json.loads(told.stdout)
        here, there = found["dialled"][:2]
        assert (here["failed"], there["failed"]) == (0, 2)
        (conclusion,) = found["conclusions"]
        assert conclusion["cause"] == Cause.FILTERED
        assert conclusion["origin"] == f"remote ({remote})"
        assert any("from here all succeed" in each for each in found["evidence"])
        # In a shell, & would end the command that ssh runs there.
        wrong = sockhop(stage.sandbox, "doctor", target, "--http", "/a&reboot", "--remote", remote)
        assert (wrong.returncode, "could mean something to a shell" in wrong.stderr) == (2, True)
