"""Curves and heat maps as inline SVG, for pages that load nothing."""

import html
import math
from collections.abc import Sequence
from typing import NamedTuple

from data_prep.looking.html_parts import Markup

_WIDTH, _HEIGHT = 560, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 8, 22, 22
_MOST_POINTS = 800
_COLOURS = ("#1f4e79", "#c0504d", "#2f7d4f", "#d08a2e", "#6d6fb0", "#8c6d4f", "#7d9b3a", "#4a7ea8")
_FAINT, _BAND = "#b0c4de", "#e3d9b8"
# From below the mean load through white to above it.
_SHADES = ("#2166ac", "#67a9cf", "#d1e5f0", "#f7f7f7", "#fddbc7", "#ef8a62", "#b2182b")
_CELL, _MOST_COLUMNS = 6, 80

Points = Sequence[tuple[float, float]]


class Line(NamedTuple):
    """One curve; a faint one is background for the others."""

    name: str
    points: Points
    is_faint: bool = False


def curves(title: str, lines: Sequence[Line], band: Sequence[tuple[float, float, float]] = ()) -> Markup:
    """Curves over one pair of axes, above a band of (x, low, high) if there is one; "" if nothing is finite."""
    finite = [Line(name, [(x, y) for x, y in points if math.isfinite(y)], is_faint) for name, points, is_faint in lines]
    finite = [line for line in finite if line.points]
    edges = [(x, low) for x, low, _ in band] + [(x, high) for x, _, high in reversed(band)]
    everything = [point for line in finite for point in line.points] + edges
    if not finite:
        return Markup("")
    xs, ys = zip(*everything, strict=True)
    frame = _Frame(min(xs), max(xs), min(ys), max(ys))
    parts = [_axes(frame)]
    if edges:
        parts.append(f'<path fill="{_BAND}" d="{frame.path(edges)}Z"/>')
    colours = iter(_COLOURS * (1 + len(finite) // len(_COLOURS)))
    labels = []
    for line in finite:
        colour = _FAINT if line.is_faint else next(colours)
        width = 0.8 if line.is_faint else 1.5
        path = frame.path(_thinned(line.points))
        parts.append(f'<path fill="none" stroke="{colour}" stroke-width="{width}" d="{path}"/>')
        if len(line.points) == 1:
            x, y = frame.place(*line.points[0])
            parts.append(f'<circle cx="{x}" cy="{y}" r="3" fill="{colour}"/>')
        labels.append(f'<tspan style="fill: {colour}">{html.escape(line.name)} </tspan>')
    heading = f'<tspan font-weight="600">{html.escape(title)} </tspan>' + ("".join(labels) if len(finite) > 1 else "")
    return _svg(_WIDTH, _HEIGHT, f'<text x="0" y="13">{heading}</text>{"".join(parts)}')


def heat_map(title: str, columns: Sequence[Sequence[float]]) -> Markup:
    """Columns of values around 1, 0 blue and 2 or more red; of many columns only some are shown."""
    shown = columns[:: -(-len(columns) // _MOST_COLUMNS)]
    cells: dict[str, list[str]] = {}
    for i, column in enumerate(shown):
        for j, value in enumerate(column):
            shade = _SHADES[min(len(_SHADES) - 1, int(value / 2 * len(_SHADES)))]
            cells.setdefault(shade, []).append(f"M{i * _CELL} {18 + j * _CELL}h{_CELL}v{_CELL}h-{_CELL}z")
    paths = "".join(f'<path fill="{shade}" d="{"".join(places)}"/>' for shade, places in cells.items())
    width, height = max(140, len(shown) * _CELL), 20 + _CELL * max(map(len, shown))
    return _svg(width, height, f'<text x="0" y="12">{html.escape(title)}</text>{paths}')


class _Frame(NamedTuple):
    """The ranges of both axes."""

    x_low: float
    x_high: float
    y_low: float
    y_high: float

    def place(self, x: float, y: float) -> tuple[float, float]:
        """Where a point lies on the picture."""
        across = (x - self.x_low) / ((self.x_high - self.x_low) or 1)
        up = (y - self.y_low) / ((self.y_high - self.y_low) or 1)
        width, height = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM
        return round(_LEFT + across * width, 1), round(_HEIGHT - _BOTTOM - up * height, 1)

    def path(self, points: Points) -> str:
        """Points joined by lines."""
        return "M" + "L".join("{} {}".format(*self.place(x, y)) for x, y in points)


def _axes(frame: _Frame) -> str:
    parts = []
    for y in _ticks(frame.y_low, frame.y_high):
        left, height = frame.place(frame.x_low, y)
        parts.append(f'<path stroke="#d9dfe3" d="M{left} {height}H{_WIDTH - _RIGHT}"/>')
        parts.append(f'<text x="{left - 5}" y="{height + 4}" text-anchor="end">{y:.4g}</text>')
    for x in _ticks(frame.x_low, frame.x_high):
        parts.append(f'<text x="{frame.place(x, frame.y_low)[0]}" y="{_HEIGHT - 6}" text-anchor="middle">{x:,g}</text>')
    return "".join(parts)


def _ticks(low: float, high: float) -> list[float]:
    """Three to six round numbers between both ends."""
    if low == high:
        return [low]
    unit = 10 ** math.floor(math.log10(high - low))
    step = next(unit * part for part in (0.2, 0.5, 1, 2) if (high - low) / (unit * part) <= 6)
    return [step * i for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _thinned(points: Points) -> Points:
    """At most so many points, of each group of neighbours the lowest and the highest: spikes stay."""
    group = -(-2 * len(points) // _MOST_POINTS)
    if group <= 1:
        return points
    kept: list[tuple[float, float]] = []
    for start in range(0, len(points), group):
        neighbours = points[start : start + group]
        kept += sorted({min(neighbours, key=lambda p: p[1]), max(neighbours, key=lambda p: p[1])})
    return kept


def _svg(width: int, height: int, content: str) -> Markup:
    return Markup(
        f'<svg role="img" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        f'xmlns="http://www.w3.org/2000/svg">{content}</svg>\n'
    )
