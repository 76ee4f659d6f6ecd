"""`sockhop get --watch`: a table that stays current, or a line for each change."""

import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import click
import msgspec

from sockhop.cli.output import Column, cells, shown, table, widths
from sockhop.errors import SystemLackError

__all__ = ["Watch"]

Identity = tuple[Any, ...]
_PASSING = {"age", "sent", "received", "waiting"}
"""Attributes that may differ at every look, which is no change."""


class _Ended(Exception):
    """A signal asks to end; its number is the argument."""


class _Event(NamedTuple):
    event: str
    row: Any


class Watch:
    """Looks at rows again and again, and shows them."""

    def __init__(
        self,
        read: Callable[[], Sequence[Any]],
        columns: Sequence[Column],
        identity: Sequence[str],
        output: str,
    ) -> None:
        """*read* returns the rows now; the attributes *identity* tell which row is which."""
        self._read = read
        self._columns = shown(columns, output)
        self._identity = identity
        self._output = output

    def run(self, interval: float, count: int | None) -> int:
        """Show the rows every *interval* seconds until a signal comes, or *count* times.

        Return the exit status: 0, but 128 + its number for another signal than SIGINT.
        """
        in_place = sys.stdout.isatty() and self._output in ("table", "wide")
        looks = self._looks(interval, count)
        old = signal.signal(signal.SIGTERM, _end), signal.signal(signal.SIGINT, _end)
        try:
            self._refresh(looks) if in_place else self._append(looks)
        except _Ended as end:
            (number,) = end.args
            return 0 if number == signal.SIGINT else 128 + number
        finally:
            for number, handler in zip((signal.SIGTERM, signal.SIGINT), old, strict=True):
                signal.signal(number, handler)
        return 0

    def _looks(self, interval: float, count: int | None) -> Iterator[Sequence[Any]]:
        """Yield the rows; after the first time none where nothing is installed any more."""
        yield self._read()
        done, due = 1, time.monotonic() + interval
        while done != count:
            time.sleep(max(due - time.monotonic(), 0))
            due = max(due + interval, time.monotonic())
            try:
                yield self._read()
            except SystemLackError:
                yield ()
            done += 1

    # --- on a terminal --------------------------------------------------------------------------

    def _refresh(self, looks: Iterator[Sequence[Any]]) -> None:
        from rich.console import Console  # noqa: PLC0415 (slow to import)
        from rich.live import Live  # noqa: PLC0415
        from rich.text import Text  # noqa: PLC0415

        console = Console(highlight=False, markup=False, emoji=False)
        with Live(console=console, auto_refresh=False, vertical_overflow="ellipsis") as live:
            for rows in looks:
                text = table([self._titles(), *cells(rows, self._columns)])
                live.update(Text(text, no_wrap=True, overflow="crop"), refresh=True)

    # --- elsewhere ------------------------------------------------------------------------------

    def _append(self, looks: Iterator[Sequence[Any]]) -> None:
        before: dict[Identity, Any] = {}
        least = [len("changed"), *[0 for _ in self._columns]]
        for number, rows in enumerate(looks):
            now = {self._identify(row): row for row in rows}
            events = list(_events(before, now))
            before = now
            if self._output in ("json", "yaml"):
                for event in events:
                    self._print_value(event)
            elif lines := self._lines(events, titled=not number):
                click.echo(table(lines, least))
                least = widths(lines, least)
            sys.stdout.flush()

    def _lines(self, events: Sequence[_Event], *, titled: bool) -> list[list[str]]:
        titles = [["EVENT", *self._titles()]] if titled else []
        rows = cells((event.row for event in events), self._columns)
        return titles + [[e.event, *row] for e, row in zip(events, rows, strict=True)]

    def _print_value(self, event: _Event) -> None:
        value = {"event": event.event, **msgspec.to_builtins(event.row)}
        if self._output == "json":
            click.echo(msgspec.json.encode(value).decode())
            return
        import yaml  # noqa: PLC0415

        click.echo("---\n" + yaml.safe_dump(value, sort_keys=False), nl=False)

    def _titles(self) -> list[str]:
        return [column.title for column in self._columns]

    def _identify(self, row: Any) -> Identity:
        return tuple(getattr(row, attribute) for attribute in self._identity)


def _events(before: dict[Identity, Any], now: dict[Identity, Any]) -> Iterator[_Event]:
    for identity, row in now.items():
        if identity not in before:
            yield _Event("added", row)
        elif _lasting(before[identity]) != _lasting(row):
            yield _Event("changed", row)
    for identity in before.keys() - now.keys():
        yield _Event("gone", before[identity])


def _lasting(row: Any) -> dict[str, Any]:
    return {key: value for key, value in msgspec.structs.asdict(row).items() if key not in _PASSING}


def _end(number: int, _: object) -> None:
    raise _Ended(number)
