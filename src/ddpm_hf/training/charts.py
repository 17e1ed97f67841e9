"""Line charts as SVG within a page: they take the colours of the page, light or dark, and its width."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 360, 190, 52, 8, 10, 26  # legible on a phone, where it fills the page
POINTS = 300  # of a line; longer ones are averaged
STYLE = """
.charts { display: flex; flex-wrap: wrap; gap: 0 1.5rem; } .charts > div { flex: 1 1 17rem; max-width: 29rem; }
svg { width: 100%; height: auto; display: block; margin: .4rem 0; font: 12px system-ui, sans-serif; }
svg text { fill: var(--soft); } svg .grid { stroke: var(--line); stroke-width: 1; }
svg polyline { fill: none; stroke: #2f78d8; stroke-width: 2; stroke-linejoin: round; }
svg .second { stroke: var(--soft); stroke-dasharray: 5 4; } svg .mark { stroke: #2a9d5c; stroke-width: 2; }
svg circle { fill: #2f78d8; } svg circle.second { fill: var(--soft); stroke: none; }
"""


class Line(NamedTuple):
    """A line of a chart: its name, and the points (x, y) in order of x."""

    name: str
    points: Sequence[tuple[float, float]]


def line_chart(title: str, lines: Sequence[Line], *, log: bool = False, mark: float | None = None) -> str:
    """A chart of up to two lines against optimizer updates.

    Args:
        title: what the vertical axis shows, also for screen readers.
        log: whether the vertical axis is logarithmic; values of 0 or less are then left out.
        mark: the x of a vertical line.

    Returns:
        The SVG; nothing without a finite point.
    """
    drawn = [Line(line.name, _thin([p for p in line.points if _fits(p[1], log)])) for line in lines]
    points = [p for line in drawn for p in line.points]
    if not points:
        return ""
    scale = math.log10 if log else float
    right = max(x for x, _ in points) or 1.0
    low, high = min(scale(y) for _, y in points), max(scale(y) for _, y in points)
    margin = 0.05 * (high - low) or abs(high) * 0.1 or 1.0
    low, high = low - margin if log or low < 0 else max(0.0, low - margin), high + margin

    def place(x: float, y: float) -> tuple[float, float]:
        across = LEFT + (WIDTH - LEFT - RIGHT) * x / right
        return round(across, 1), round(TOP + (HEIGHT - TOP - BOTTOM) * (high - scale(y)) / (high - low), 1)

    parts = []
    for i in range(5):
        value = low + (high - low) * i / 4
        shown = 10**value if log else value
        _, y = place(0, shown)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4}" text-anchor="end">{_number(shown)}</text>')
    for x, anchor, unit in ((0.0, "start", ""), (right / 2, "middle", ""), (right, "end", " updates")):
        across, _ = place(x, points[0][1])
        parts.append(f'<text x="{across}" y="{HEIGHT - 8}" text-anchor="{anchor}">{x:,.0f}{unit}</text>')
    if mark is not None:
        across, _ = place(mark, points[0][1])
        parts.append(f'<line class="mark" x1="{across}" x2="{across}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
    for kind, line in zip(("first", "second"), drawn, strict=False):
        places = [place(*p) for p in line.points]
        parts.append(f'<polyline class="{kind}" points="{" ".join(f"{x},{y}" for x, y in places)}"/>')
        if len(places) <= 30:
            parts += [f'<circle class="{kind}" cx="{x}" cy="{y}" r="3"/>' for x, y in places]
    names = [line.name for line in drawn if line.name and line.points]
    legend = f'<p class="note">{escape("; ".join(names))}</p>' if names else ""
    return (
        f'<div><h3>{escape(title)}</h3><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escape(title)}, against updates">{"".join(parts)}</svg>{legend}</div>'
    )


def _number(value: float) -> str:
    """Three digits, and as few characters as an axis has room for."""
    if value == 0 or 0.01 <= abs(value) < 1e5:
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    digits, _, power = f"{value:.1e}".partition("e")
    return f"{digits}e{int(power)}"


def _fits(value: float, log: bool) -> bool:
    return math.isfinite(value) and (value > 0 or not log)


def _thin(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most POINTS points: means of as many neighbours each."""
    size = math.ceil(len(points) / POINTS) or 1
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [(sum(x for x, _ in g) / len(g), sum(y for _, y in g) / len(g)) for g in groups]
