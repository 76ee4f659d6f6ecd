"""Draws what `sockhop bench splice` found, as SVG: speed as a multiple of plain TCP."""

from collections.abc import Iterator
from html import escape
from typing import NamedTuple

from sockhop.bench.report import SpliceReport, SpliceResult, Spread
from sockhop.bench.svg import FAINT, INK, document, legend, machine_text, moved, text

__all__ = ["draw_splice"]

_COLOURS = {
    "plain TCP, again": "#9aa5b1",
    "sockhop": "#1f6feb",
    "sockhop, left": "#8ab4f8",
    "sockmap by tuple": "#e8912d",
    "Unix socket": "#5f9e6e",
}
_MARGIN, _WIDTH = 24, 520
_LABEL_WIDTH, _VALUE_WIDTH = 150, 48
_BAR, _PITCH, _GAP = 9, 12, 9
_HEAD, _PANEL_HEAD = 96, 40


class _Panel(NamedTuple):
    title: str
    groups: list[tuple[str, list[SpliceResult]]]

    @property
    def height(self) -> int:
        bars = sum(len(results) for _, results in self.groups)
        return _PANEL_HEAD + bars * _PITCH + len(self.groups) * _GAP


def draw_splice(report: SpliceReport) -> str:
    """Return an SVG document: a panel for each kind of load, bars for each peer."""
    panels = _panels(report)
    columns: tuple[list[_Panel], list[_Panel]] = ([], [])
    heights = [0, 0]
    for panel in panels:  # the shorter column takes the next one
        shorter = heights.index(min(heights))
        columns[shorter].append(panel)
        heights[shorter] += panel.height + _MARGIN
    width, height = 2 * _WIDTH + 3 * _MARGIN, _HEAD + max(heights)
    highest = max(_spread(r).upper for p in panels for _, results in p.groups for r in results)
    parts = list(_head(report))
    for number, column in enumerate(columns):
        x, y = _MARGIN + number * (_WIDTH + _MARGIN), _HEAD
        for panel in column:
            parts += moved(x, y, _draw_panel(panel, min(highest, 4.0)))
            y += panel.height + _MARGIN
    return document(width, height, parts)


def _spread(result: SpliceResult) -> Spread:
    """What is drawn: where both ends share a CPU the time of the CPU, which noise leaves alone."""
    return result.per_cpu_to_plain if result.cpus == "one CPU" else result.speed_to_plain


def _panels(report: SpliceReport) -> list[_Panel]:
    named = {"exchange": "there and back", "stream": "stream"}
    found: dict[str, dict[str, list[SpliceResult]]] = {}
    for result in report.results:
        if result.peer not in _COLOURS:
            continue
        if result.what in named:
            title = f"{named[result.what]}, {result.place}, {result.cpus}"
            label = f"{result.size:,} B" if result.size < 1024 else f"{result.size >> 10} KiB"
        else:
            title = "connections and programs, loopback, two CPUs"
            label = "set up and close" if result.what == "setup" else result.what
        found.setdefault(title, {}).setdefault(label, []).append(result)
    order = list(_COLOURS)
    return [
        _Panel(title, [(label, sorted(results, key=lambda r: order.index(r.peer)))
                       for label, results in groups.items()])
        for title, groups in found.items()
    ]  # fmt: skip


def _head(report: SpliceReport) -> Iterator[str]:
    yield text(_MARGIN, 32, "Speed of local TCP, as a multiple of plain TCP", size=18, bold=True)
    yield text(
        _MARGIN,
        52,
        f"median and quartiles of {report.rounds} interleaved rounds; on one CPU: work for each "
        f"CPU second.  {machine_text(report.machine)}",
        colour=FAINT,
    )
    yield from legend(
        _MARGIN, ((peer, colour, 30 + 7 * len(peer)) for peer, colour in _COLOURS.items())
    )


def _draw_panel(panel: _Panel, highest: float) -> Iterator[str]:
    yield text(0, 16, panel.title, size=14, bold=True)
    yield f'<line x1="0" y1="24" x2="{_WIDTH}" y2="24" stroke="#d5dbe1"/>'
    scale = (_WIDTH - _LABEL_WIDTH - _VALUE_WIDTH) / highest
    y = _PANEL_HEAD
    for label, results in panel.groups:
        middle = y + len(results) * _PITCH // 2
        yield text(_LABEL_WIDTH - 10, middle + 3, label, anchor="end")
        for result in results:
            yield from _draw_bar(result, y, scale, highest)
            y += _PITCH
        y += _GAP
    one = _LABEL_WIDTH + scale
    yield (
        f'<line x1="{one:.1f}" y1="{_PANEL_HEAD - 6}" x2="{one:.1f}" y2="{y - _GAP + 2}" '
        f'stroke="{INK}" stroke-dasharray="3 3"/>'
    )


def _draw_bar(result: SpliceResult, y: int, scale: float, highest: float) -> Iterator[str]:
    spread, middle = _spread(result), y + _BAR / 2
    x = _LABEL_WIDTH
    length = min(spread.median, highest) * scale
    low, high = (x + min(edge, highest) * scale for edge in (spread.lower, spread.upper))
    yield (
        f'<rect x="{x}" y="{y}" width="{length:.1f}" height="{_BAR}" rx="1.5" '
        f'fill="{_COLOURS[result.peer]}"><title>{escape(result.peer)}</title></rect>'
    )
    yield (
        f'<path d="M{low:.1f} {middle}H{high:.1f}M{low:.1f} {y + 2}V{y + _BAR - 2}'
        f'M{high:.1f} {y + 2}V{y + _BAR - 2}" stroke="{INK}" stroke-opacity="0.55" fill="none"/>'
    )
    end = max(high, x + length, x + scale)  # not across the line of plain TCP
    yield text(end + 6, y + _BAR - 1, f"{spread.median:.2f}", size=10, colour=FAINT)
