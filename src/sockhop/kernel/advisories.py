"""Known faults of Linux in what sockhop uses (`advisories.tsv`), and which a kernel may have.

Versions only suspect: vendors backport fixes and faults. What can be tried is tried
(:mod:`sockhop.datapath.splicecheck`).
"""

import os
import re
from functools import cache
from importlib.resources import files
from typing import NamedTuple

__all__ = ["Advisory", "advisories", "is_affected", "known_faults", "parse_release"]

Version = tuple[int, int, int]
_SERIOUS = ("crash", "hang", "corrupt")


class Advisory(NamedTuple):
    """A fault. `introduced`: the first affected version, "" if unknown; `fixed`: the first fixed
    ones, of each stable series and of mainline, none if it is not fixed; `used_by`: splice for what
    splicing does; `effect`: crash, hang, corrupt, leak, race, stale or "".
    """

    name: str
    title: str
    introduced: str
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
        versions = tuple(fixed.split(",")) if fixed else ()
        found.append(Advisory(name, title, introduced, versions, used_by, effect))
    return tuple(found)


def parse_release(release: str) -> Version:
    """Return the version in a release such as `6.1.0-18-amd64` or `6.18.44`."""
    found = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?", release)
    if found is None:
        return 0, 0, 0
    return int(found[1]), int(found[2]), int(found[3] or 0)


def is_affected(advisory: Advisory, version: Version) -> bool:
    """Tell whether a kernel of kernel.org with that version has the fault."""
    if not advisory.introduced or version < parse_release(advisory.introduced):
        return False
    fixes = [parse_release(fixed) for fixed in advisory.fixed]
    own = [fix for fix in fixes if fix[:2] == version[:2]]
    if own:
        return version < own[0]
    return not fixes or version < max(fixes)


def known_faults(used_by: str = "splice", release: str | None = None) -> list[Advisory]:
    """Return the faults that *release*, by default the running kernel, may have."""
    version = parse_release(release or os.uname().release)
    return [each for each in advisories() if each.used_by == used_by and is_affected(each, version)]
