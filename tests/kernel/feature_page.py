"""The tables of docs/features.md: `python -m tests.kernel.feature_page` writes them anew."""

import re
from collections.abc import Iterable
from pathlib import Path

from sockhop.kernel.advisories import advisories
from sockhop.kernel.feature_table import BPFFS, CGROUP2, PROBES, Probe

__all__ = ["PAGE", "with_tables"]

PAGE = Path(__file__).parents[2] / "docs" / "features.md"


def _table(head: str, rows: Iterable[tuple[str, ...]]) -> str:
    lines = [head, " | ".join(["| ---"] + ["---"] * (head.count("|") - 2)) + " |"]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join(lines)


def _features() -> str:
    mounts = [Probe(*each, lambda _: None) for each in (CGROUP2, BPFFS)]
    rows = []
    for each in (*mounts, *PROBES):
        since = str(each.since).removeprefix("Linux ").removeprefix("kernel ")
        found = re.fullmatch(r'commit (\w+) \("(.*)"\) \(in v([\d.]+)\)', since)
        version, commit = (found[3], f"{found[1]} “{found[2]}”") if found else (since[1:], "")
        used, without = each.used_for.removeprefix("later: "), each.without
        rows.append((f"`{each.name}`" if "(" in each.name or "_" in each.name else each.name,
                     version, used, f"**{without}**" if each.required else without,
                     commit))  # fmt: skip
    return _table("| feature | Linux | used for | without it | came with |", rows)


def _faults() -> str:
    rows = [
        (each.name, each.effect or "", ", ".join(each.introduced) or "not known",
         ", ".join(each.fixed) or "not fixed", each.title)
        for each in advisories()
        if each.used_by != "sockmap"
    ]  # fmt: skip
    return _table("| fault | effect | from | fixed in | what |", rows)


def with_tables(page: str) -> str:
    """Return *page* with the tables between its marks made anew."""
    for name, table in (("features", _features()), ("faults", _faults())):
        begin, end = f"<!-- {name}: generated -->\n", f"<!-- end of {name} -->\n"
        before, _, rest = page.partition(begin)
        page = f"{before}{begin}{table}\n{end}{rest.partition(end)[2]}"
    return page


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text()))
