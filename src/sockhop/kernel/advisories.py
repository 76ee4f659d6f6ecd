"""Known faults of Linux in what sockhop uses (`advisories.tsv`), and which a kernel may have.

Versions only suspect: vendors backport fixes and faults. What can be tried is tried
(:mod:`sockhop.datapath.splicecheck`).
"""

import os
import re
from contextlib import suppress
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

__all__ = [
    "Advisory",
    "advisories",
    "is_affected",
    "is_upstream",
    "known_faults",
    "parse_release",
    "running_release",
    "with_patch_level",
]

Version = tuple[int, int, int]
_SERIOUS = ("crash", "hang", "corrupt")
_SIGNATURE = Path("/proc/version_signature")


class Advisory(NamedTuple):
    """A fault. `introduced`: the first affected versions, of stable series that got the fault later
    and of mainline, none if unknown; `fixed`: the first fixed ones, of each stable series and of
    mainline, none if it is not fixed; `used_by`: splice for what splicing does, sockmap for other
    uses of sockmaps, sever, iterators, balance; `effect`: crash, hang, corrupt, leak, race, stale
    or "".
    """

    name: str
    title: str
    introduced: tuple[str, ...]
    fixed: tuple[str, ...]
    used_by: str
    effect: str

    @property
    def serious(self) -> bool:
        """Whether it can take the node down or spoil bytes."""
        return self.effect in _SERIOUS


@cache
def advisories() -> tuple[Advisory, ...]:
    """Return all that are known."""
    found = []
    for line in files("sockhop.kernel").joinpath("advisories.tsv").read_text().splitlines():
        if line.startswith("#"):
            continue
        name, title, introduced, fixed, used_by, effect = line.split("\t")
        found.append(
            Advisory(name, title, _versions(introduced), _versions(fixed), used_by, effect)
        )
    return tuple(found)


def _versions(text: str) -> tuple[str, ...]:
    return tuple(text.split(",")) if text else ()


def parse_release(release: str) -> Version:
    """Return the version in a release such as `6.1.0-18-amd64` or `6.18.44`; zeros if none is."""
    found = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?(?!\d)", release)
    if found is None:
        return 0, 0, 0
    return int(found[1]), int(found[2]), int(found[3] or 0)


def is_upstream(release: str) -> bool:
    """Whether *release* is one of kernel.org: a vendor's has more than numbers, such as `-16.al8`.

    A vendor moves fixes, and with them faults, to older versions.
    """
    return re.fullmatch(r"\d+\.\d+(\.\d+)?(-rc\d+)?", release) is not None


def running_release() -> str:
    """Return the release of the running kernel, with the patch level that it is based on."""
    system = os.uname()
    told = system.version
    with suppress(OSError, IndexError):
        told = f"Ubuntu {_SIGNATURE.read_text().split()[-1]}"
    return with_patch_level(system.release, told)


def with_patch_level(release: str, told: str) -> str:
    """Return *release* behind the version that it is based on, where *told* has that.

    Debian and Ubuntu call theirs `6.1.0-50` whatever the patch level is, and tell it elsewhere: in
    uname's version (Debian), in /proc/version_signature (Ubuntu).
    """
    found = re.search(r"(?:Debian|Ubuntu) (\d+\.\d+\.\d+\S*)", told)
    if found and parse_release(found[1])[:2] == parse_release(release)[:2]:
        return f"{found[1]} ({release})"
    return release


def is_affected(advisory: Advisory, version: Version) -> bool | None:
    """Tell whether a kernel of kernel.org with that version has the fault; None: not known."""
    if not advisory.introduced:
        return None
    came = [parse_release(each) for each in advisory.introduced]
    if version < _of_series(came, version):
        return False
    fixes = [parse_release(each) for each in advisory.fixed]
    return not fixes or version < _of_series(fixes, version)


def _of_series(versions: list[Version], version: Version) -> Version:
    """Return the one of the same stable series, else the mainline one, which is the highest."""
    return next((each for each in versions if each[:2] == version[:2]), max(versions))


def known_faults(used_by: str = "splice", release: str | None = None) -> list[Advisory]:
    """Return the faults that *release*, by default the running kernel, may have."""
    version = parse_release(release or running_release())
    return [each for each in advisories() if each.used_by == used_by and is_affected(each, version)]
