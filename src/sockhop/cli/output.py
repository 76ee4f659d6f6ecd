"""Prints rows as an aligned table, JSON or YAML."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import click
import msgspec

__all__ = ["Column", "age", "print_rows", "print_value", "table"]


class Column(NamedTuple):
    """A column of a table: its title, the attribute of the row that it shows, if only in wide."""

    title: str
    attribute: str
    wide: bool = False


def print_rows(rows: Sequence[Any], columns: Sequence[Column], output: str) -> None:
    """Print *rows* (msgspec structs) as *output* says: table, wide, json or yaml."""
    if output in ("json", "yaml"):
        print_value(rows, output)
        return
    shown = [column for column in columns if output == "wide" or not column.wide]
    cells = [[_cell(getattr(row, column.attribute)) for column in shown] for row in rows]
    click.echo(table([[column.title for column in shown], *cells]))


def print_value(value: Any, output: str) -> None:
    """Print any value as JSON or YAML."""
    if output == "yaml":
        import yaml  # noqa: PLC0415 (only here, and slow to import)

        click.echo(yaml.safe_dump(msgspec.to_builtins(value), sort_keys=False), nl=False)
    else:
        click.echo(msgspec.json.format(msgspec.json.encode(value), indent=2).decode())


def table(rows: Sequence[Sequence[str]]) -> str:
    """Return *rows* of text as lines, each column as wide as its widest cell."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def age(seconds: float) -> str:
    """Return a duration in its largest whole units: 3d4h, 5m12s, 7s."""
    rest, parts = int(seconds), []
    for unit, length in (("d", 86400), ("h", 3600), ("m", 60), ("s", 1)):
        count, rest = divmod(rest, length)
        if count:
            parts.append(f"{count}{unit}")
    return "".join(parts[:2]) or "0s"


def _cell(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ",".join(map(str, value)) or "-"
    return "-" if value in ("", None) else str(value)
