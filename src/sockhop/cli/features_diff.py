"""`sockhop features --diff`."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from sockhop.cli.output import Column, counted, print_rows, print_value
from sockhop.errors import InputError

if TYPE_CHECKING:
    from sockhop.diagnose.nodes import Comparison, Difference, Node

__all__ = ["print_differences", "read_pair"]

_COLUMNS = (
    Column("KIND", "kind"),
    Column("NAME", "name"),
    Column("HERE", "here"),
    Column("THERE", "there"),
    Column("USED FOR", "used_for"),
)
_FEW = 8
"""So many differences of a struct, and of functions of one use, are listed without -o wide."""


def read_pair(paths: tuple[Path, ...]) -> "tuple[Node | None, Node]":
    """Return the two nodes of --diff; None for this one."""
    from sockhop.diagnose.nodes import read_node  # noqa: PLC0415 (needs the extension)

    if len(paths) > 2:
        raise InputError("--diff compares two nodes", hint="give it once, or twice for two files")
    *first, other = map(read_node, paths)
    return (first[0] if first else None), other


def print_differences(compared: "Comparison", output: str) -> int:
    """Print what differs; return the exit status."""
    if output in ("json", "yaml"):
        print_value(compared, output)
        return int(bool(compared.differences))
    rows = compared.differences
    if rows:
        print_rows(rows if output == "wide" else list(_folded(rows)), _COLUMNS, output)
        click.echo()
    click.echo(counted(len(rows), "difference"))
    if compared.not_compared:
        click.echo(f"not compared, one side does not tell: {', '.join(compared.not_compared)}")
    return int(bool(rows))


def _folded(rows: "list[Difference]") -> "Iterator[Difference]":
    """Rows, one instead of many where members of one struct or functions of one use differ."""
    groups: dict[tuple[str, str], list[Difference]] = {}
    for row in rows:
        groups.setdefault((row.kind, _group(row)), []).append(row)
    for (kind, name), group in groups.items():
        if len(group) <= _FEW:
            yield from group
            continue
        only_here = sum(row.there == "-" for row in group)
        only_there = sum(row.here == "-" for row in group)
        other = len(group) - only_here - only_there
        yield type(group[0])(
            kind,
            name,
            f"{only_here} only here",
            f"{only_there} only there" + (f", {other} otherwise" if other else ""),
            f"{group[0].used_for} (-o wide lists them)",
        )


def _group(row: "Difference") -> str:
    if row.kind == "member":
        return f"{row.name.partition('.')[0]}.…"
    if row.kind == "function":
        return f"for {row.used_for}"
    if row.kind == "macro" and "__HELPER_" in row.name:
        return row.name.partition("__HELPER_")[0] + "__HELPER_…"
    return row.name
