"""The agent's API is for root only, by SO_PEERCRED: file modes are only the first fence."""

import json
import stat
import subprocess
from pathlib import Path

import pytest

from tests.sandbox import Sandbox, compact

pytestmark = pytest.mark.kernel

NOBODY = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--")
# Root of a user namespace of its own is still nobody.
MADE_ROOT = (*NOBODY, "unshare", "--user", "--map-root-user")


def get_status(api: Path, *prefix: str) -> tuple[int, str]:
    """Ask with curl; return the HTTP status (0 without a connection) and the body."""
    command = (*prefix, "curl", "-qsS", "--max-time", "5", "--unix-socket", str(api),
               "--write-out", "\n%{http_code}", "http://localhost/v1/status")  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    body, _, status = result.stdout.rpartition("\n")
    return int(status or 0), body


@pytest.fixture
def api(sandbox: Sandbox) -> Path:
    """The socket of an agent, in a directory that the agent has made."""
    path = sandbox.directory / "made" / "api.sock"
    sandbox.start_agent("-f", str(sandbox.manifest(compact())), "--api", str(path)).wait_ready()
    return path


def test_modes_keep_others_out(api: Path) -> None:
    assert stat.S_IMODE(api.stat().st_mode) == 0o600
    assert stat.S_IMODE(api.parent.stat().st_mode) == 0o700
    assert get_status(api, *NOBODY) == (0, "")


@pytest.mark.parametrize("prefix", [NOBODY, MADE_ROOT], ids=["nobody", "root-of-own-userns"])
def test_the_peer_decides_where_modes_do_not(
    sandbox: Sandbox, api: Path, prefix: tuple[str, ...]
) -> None:
    if subprocess.run([*prefix, "true"], check=False, capture_output=True).returncode:
        pytest.skip(f"this machine does not let nobody run {' '.join(prefix)}")
    api.chmod(0o666)
    for directory in (api.parent, sandbox.directory):
        directory.chmod(0o755)
    status, body = get_status(api, *prefix)
    assert status == 403
    assert json.loads(body) == {"error": "this API is for root"}
    status, body = get_status(api)
    assert status == 200
    assert json.loads(body)["bpffs"] == str(sandbox.pins)
