"""What the drawings of benchmarks are made of."""

from collections.abc import Iterable, Iterator
from html import escape

from sockhop.bench.report import Machine

__all__ = ["FAINT", "INK", "document", "legend", "machine_text", "moved", "text"]

INK, FAINT = "#1f2933", "#616e7c"


def document(width: int, height: int, parts: Iterable[str]) -> str:
    """Return an SVG document of *parts*, in pixels."""
    return "\n".join(
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
            f'viewBox="0 0 {width} {height}" font-family="system-ui, sans-serif" font-size="12">',
            f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
            *parts,
            "</svg>\n",
        )
    )


def moved(x: int, y: int, parts: Iterable[str]) -> Iterator[str]:
    """Yield *parts* as a group whose origin is at *x*, *y*."""
    yield f'<g transform="translate({x},{y})">'
    yield from parts
    yield "</g>"


def legend(x: int, colours: Iterable[tuple[str, str, int]]) -> Iterator[str]:
    """Yield a line of names from *x* on: each with its colour, and how far the next one is."""
    for name, colour, width in colours:
        yield f'<rect x="{x}" y="66" width="12" height="12" rx="2" fill="{colour}"/>'
        yield text(x + 18, 76, name)
        x += width


def machine_text(machine: Machine) -> str:
    """Return on what was measured, and when."""
    return f"{machine.cpu}, {machine.cpus} CPUs, Linux {machine.kernel}, {machine.date[:10]}"


def text(  # noqa: PLR0913
    x: float,
    y: float,
    said: str,
    *,
    size: int = 12,
    bold: bool = False,
    colour: str = INK,
    anchor: str = "start",
) -> str:
    """Return an SVG text at x, y."""
    weight = ' font-weight="600"' if bold else ""
    return (
        f'<text x="{x:.1f}" y="{y}" font-size="{size}" fill="{colour}" '
        f'text-anchor="{anchor}"{weight}>{escape(said)}</text>'
    )
