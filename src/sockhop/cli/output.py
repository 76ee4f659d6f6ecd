"""Prints rows as an aligned table, JSON or YAML."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import click
import msgspec

__all__ = [
    "Column",
    "age",
    "cells",
    "counted",
    "phrases",
    "print_rows",
    "print_value",
    "shown",
    "table",
    "widths",
]


class Column(NamedTuple):
    """A column of a table: its title, the attribute of the row that it shows, if only in wide.

    `text` makes a cell of the attribute's value, where str() does not do.
    """

    title: str
    attribute: str
    wide: bool = False
    text: Callable[[Any], str] | None = None


def print_rows(rows: Sequence[Any], columns: Sequence[Column], output: str) -> None:
    """Print *rows* (msgspec structs) as *output* says: table, wide, json or yaml."""
    if output in ("json", "yaml"):
        print_value(rows, output)
        return
    columns = shown(columns, output)
    click.echo(table([[column.title for column in columns], *cells(rows, columns)]))


def shown(columns: Iterable[Column], output: str) -> list[Column]:
    """Return the columns that *output*, table or wide, shows."""
    return [column for column in columns if output == "wide" or not column.wide]


def cells(rows: Iterable[Any], columns: Sequence[Column]) -> list[list[str]]:
    """Return the cells of *rows*."""
    return [[_cell(getattr(row, column.attribute), column) for column in columns] for row in rows]


def print_value(value: Any, output: str) -> None:
    """Print any value as JSON or YAML."""
    if output == "yaml":
        import yaml  # noqa: PLC0415 (only here, and slow to import)

        click.echo(yaml.safe_dump(msgspec.to_builtins(value), sort_keys=False), nl=False)
    else:
        click.echo(msgspec.json.format(msgspec.json.encode(value), indent=2).decode())


def table(rows: Sequence[Sequence[str]], least: Sequence[int] = ()) -> str:
    """Return *rows* of text as lines, aligned; *least*: see :func:`widths`."""
    room = widths(rows, least)
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, room, strict=True)).rstrip()
        for row in rows
    )


def widths(rows: Sequence[Sequence[str]], least: Sequence[int] = ()) -> list[int]:
    """Return how wide each column is: its widest cell, and no less than *least* says."""
    found = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return list(map(max, found, least)) if least else found


def age(seconds: float) -> str:
    """Return a duration in its largest whole units: 3d4h, 5m12s, 7s."""
    rest, parts = int(seconds), []
    for unit, length in (("d", 86400), ("h", 3600), ("m", 60), ("s", 1)):
        count, rest = divmod(rest, length)
        if count:
            parts.append(f"{count}{unit}")
    return "".join(parts[:2]) or "0s"


def counted(number: int, thing: str) -> str:
    """Return `1 service`, `2,000 services`."""
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def phrases(parts: Sequence[str]) -> str:
    """Return the cell of *parts* in which there are blanks and commas."""
    return "; ".join(parts) or "-"


def _cell(value: Any, column: Column) -> str:
    if column.text is not None:
        return column.text(value)
    if isinstance(value, list | tuple):
        return ",".join(map(str, value)) or "-"
    return "-" if value in ("", None) else str(value)
