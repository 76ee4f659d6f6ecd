"""Draws what `sockhop bench connect` found, as SVG."""

from collections.abc import Iterator
from html import escape
from typing import NamedTuple

from sockhop.bench.connect import DIRECT, HAPROXY, NFTABLES, SOCKHOP
from sockhop.bench.messages import Operation
from sockhop.bench.report import ConnectReport, Result, Run
from sockhop.bench.svg import FAINT, INK, document, legend, machine_text, moved, text
from sockhop.model import Protocol

__all__ = ["draw"]

_COLOURS = {DIRECT: "#9aa5b1", SOCKHOP: "#1f6feb", NFTABLES: "#e8912d", HAPROXY: "#b5485d"}
_TITLES = {
    Operation.CONNECT: "connect, close",
    Operation.ASK: "connect, 64 bytes there and back, close",
}

_MARGIN = 24
_PANEL_WIDTH = 520
_LABEL_WIDTH = 118
_VALUE_WIDTH = 122
_BAR, _PITCH, _GAP = 14, 18, 14
"""Heights: of a bar, from one to the next, between the groups."""
_HEAD, _PANEL_HEAD = 96, 40


class _Panel(NamedTuple):
    operation: Operation
    protocol: Protocol
    groups: list[tuple[Run, list[Result]]]

    @property
    def height(self) -> int:
        bars = sum(len(results) for _, results in self.groups)
        return _PANEL_HEAD + bars * _PITCH + len(self.groups) * _GAP

    @property
    def highest(self) -> float:
        return max(result.nanoseconds.upper for _, results in self.groups for result in results)


def draw(report: ConnectReport) -> str:
    """Return an SVG document: a panel for TCP and UDP of each operation, bars for each peer."""
    panels = [
        _panel(report, operation, protocol) for operation in Operation for protocol in Protocol
    ]
    left, right = panels[::2], panels[1::2]
    rows = [max(a.height, b.height) for a, b in zip(left, right, strict=True)]
    width = 2 * _PANEL_WIDTH + 3 * _MARGIN
    height = _HEAD + sum(rows) + len(rows) * _MARGIN
    parts = list(_head(report))
    top = _HEAD
    for pair, row in zip(zip(left, right, strict=True), rows, strict=True):
        for column, panel in enumerate(pair):
            x = _MARGIN + column * (_PANEL_WIDTH + _MARGIN)
            parts += moved(x, top, _draw_panel(panel))
        top += row + _MARGIN
    return document(width, height, parts)


def _panel(report: ConnectReport, operation: Operation, protocol: Protocol) -> _Panel:
    groups = []
    for run in report.runs:
        found = {
            result.peer: result
            for result in run.results
            if (result.operation, result.protocol) == (operation, protocol)
        }
        groups.append((run, [found[peer] for peer in _COLOURS if peer in found]))
    return _Panel(operation, protocol, groups)


def _head(report: ConnectReport) -> Iterator[str]:
    yield text(_MARGIN, 32, "Time of one connection, by number of services", size=18, bold=True)
    yield text(
        _MARGIN,
        52,
        f"median and quartiles of {report.rounds} interleaved samples; in brackets: × direct, "
        f"median of the rounds.  {machine_text(report.machine)}",
        colour=FAINT,
    )
    yield from legend(_MARGIN, ((peer, colour, 100) for peer, colour in _COLOURS.items()))


def _draw_panel(panel: _Panel) -> Iterator[str]:
    yield text(0, 16, f"{panel.protocol}: {_TITLES[panel.operation]}", size=14, bold=True)
    yield f'<line x1="0" y1="24" x2="{_PANEL_WIDTH}" y2="24" stroke="#d5dbe1"/>'
    scale = (_PANEL_WIDTH - _LABEL_WIDTH - _VALUE_WIDTH) / panel.highest
    y = _PANEL_HEAD
    for run, results in panel.groups:
        services = "1 service" if run.services == 1 else f"{run.services:,} services"
        middle = y + len(results) * _PITCH // 2
        yield text(_LABEL_WIDTH - 10, middle + 2, services, anchor="end")
        for result in results:
            yield from _draw_bar(result, y, scale)
            y += _PITCH
        y += _GAP


def _draw_bar(result: Result, y: int, scale: float) -> Iterator[str]:
    time = result.nanoseconds
    x, middle = _LABEL_WIDTH, y + _BAR / 2
    yield (
        f'<rect x="{x}" y="{y}" width="{time.median * scale:.1f}" height="{_BAR}" rx="2" '
        f'fill="{_COLOURS[result.peer]}"><title>{escape(result.peer)}</title></rect>'
    )
    low, high = x + time.lower * scale, x + time.upper * scale
    yield (
        f'<path d="M{low:.1f} {middle}H{high:.1f}M{low:.1f} {y + 4}V{y + _BAR - 4}'
        f'M{high:.1f} {y + 4}V{y + _BAR - 4}" stroke="{INK}" stroke-opacity="0.55" fill="none"/>'
    )
    ratio = "" if result.peer == DIRECT else f"  ({result.to_direct.median:.2f} ×)"
    end = max(high, x + time.median * scale)
    yield text(end + 8, y + 11, f"{time.median / 1000:.1f} µs{ratio}", colour=FAINT)
