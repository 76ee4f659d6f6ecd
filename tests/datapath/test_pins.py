"""Whether a map is pinned, for those who may know and those who may not."""

import os
from pathlib import Path

import pytest

from sockhop.datapath.pins import is_pinned, map_directory
from sockhop.errors import SystemLackError

pytestmark = pytest.mark.unit
NOBODY = 65534


def test_a_map_that_is_there_and_one_that_is_not(tmp_path: Path) -> None:
    assert not is_pinned(tmp_path, "provenance")
    map_directory(tmp_path).mkdir()
    (map_directory(tmp_path) / "provenance").touch()
    assert is_pinned(tmp_path, "provenance")
    assert not is_pinned(tmp_path / "maps" / "provenance", "provenance")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_who_is_not_root_is_told(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    os.seteuid(NOBODY)
    try:
        with pytest.raises(SystemLackError, match="Permission denied\n  run as root"):
            is_pinned(tmp_path, "provenance")
    finally:
        os.seteuid(0)
