"""Small drawings for the report: curves and gauges as SVG, coloured by the page's own variables."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby, pairwise

from markupsafe import Markup, escape
from msgspec import structs

from tempo.audit.attack import Curve, Figure
from tempo.audit.report.levels import number, progress

WIDTH, HEIGHT = 460, 270
LEFT, RIGHT, TOP, BOTTOM = 66, 20, 16, 50
COLOURS = 6
"""How many colours of lines the style sheet has."""

DASHES = ("none", "7 4", "2 4", "9 3 2 3", "4 4", "12 4")
LABEL_SPACE = 44
"""Least distance of two labels of the horizontal axis."""


class _Axis:
    """Maps values to places; by logarithms where values span more than a factor of ten."""

    def __init__(self, values: Sequence[float], first: float, last: float, *, whole: bool) -> None:
        self._first, self._last = first, last
        low, high = min(values, default=0.0), max(values, default=1.0)
        self.logarithmic = not whole and low > 0 and high / low > 10
        if whole:  # a vertical axis begins at zero, and shows all of 0 to 1 for shares
            low, high = min(low, 0.0), max(high, 0.0)
            high = 1.0 if 0.2 < high <= 1 else high
        if low == high:
            high = low + 1
        self.low, self.high = low, high
        if whole:
            step = _step(high - low)
            self.low, self.high = math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step
            count = round((self.high - self.low) / step)
            self.ticks = [self.low + step * i for i in range(count + 1)]
        else:
            self.ticks = sorted(set(values))

    def __call__(self, value: float) -> float:
        if self.logarithmic:
            share = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return round(self._first + share * (self._last - self._first), 1)


def _step(span: float) -> float:
    """A round distance that divides ``span`` into about four."""
    size = 10.0 ** math.floor(math.log10(span / 4))
    return next(factor * size for factor in (1, 2, 2.5, 5, 10) if factor * size * 4.5 >= span)


def line_chart(curve: Curve, title_id: str) -> Markup:
    """Lines over whatever was varied.

    Args:
        curve: What to draw; gaps where values are None or not finite.
        title_id: Id of the element that names the drawing.
    """
    values = [v for series in curve.series.values() for v in series if v is not None and math.isfinite(v)]
    if curve.leaks is not None:
        values.append(curve.leaks)
    x = _Axis(curve.x, LEFT + 8, WIDTH - RIGHT - 8, whole=False)
    y = _Axis(values, HEIGHT - BOTTOM, TOP, whole=True)
    parts = [
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-labelledby="{escape(title_id)}">',
        *(
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(tick)}" y2="{y(tick)}"/>'
            f'<text class="tick" x="{LEFT - 8}" y="{y(tick) + 4}" text-anchor="end">{number(round(tick, 10))}</text>'
            for tick in y.ticks
        ),
        *(
            f'<line class="tick-mark" x1="{x(tick)}" x2="{x(tick)}" y1="{HEIGHT - BOTTOM}" y2="{HEIGHT - BOTTOM + 5}"/>'
            f'<text class="tick" x="{x(tick)}" y="{HEIGHT - BOTTOM + 20}" text-anchor="middle">{number(tick)}</text>'
            for tick in _spaced(x.ticks, x)
        ),
        f'<text class="label" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 6}" text-anchor="middle">'
        f"{escape(curve.x_label)}{' (logarithmic)' if x.logarithmic else ''}</text>",
        f'<text class="label" transform="translate(13 {(TOP + HEIGHT - BOTTOM) / 2}) rotate(-90)" '
        f'text-anchor="middle">{escape(curve.y_label)}</text>',
    ]
    if curve.leaks is not None:
        level = y(curve.leaks)
        parts.append(f'<line class="threshold" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{level}" y2="{level}"/>')
    for place, series in enumerate(curve.series.values()):
        points = [(a, b) for a, b in zip(curve.x, series, strict=False)]
        parts.append(f'<g class="series s{place % COLOURS}">')
        for shown, run in groupby(points, key=lambda p: p[1] is not None and math.isfinite(p[1])):
            if shown:
                places = [(x(a), y(b)) for a, b in run if b is not None]
                path = " ".join(f"{a},{b}" for a, b in places)
                parts.append(f'<polyline points="{path}" stroke-dasharray="{DASHES[place % len(DASHES)]}"/>')
                parts += [_marker(place, a, b) for a, b in places]
        parts.append("</g>")
    return Markup("".join(parts) + "</svg>")  # noqa: S704 - every text in it is escaped


def key(place: int) -> Markup:
    """The sign of one line in a legend."""
    return Markup(  # noqa: S704 - numbers only
        f'<svg class="key" viewBox="0 0 34 12" aria-hidden="true"><g class="series s{place % COLOURS}">'
        f'<polyline points="1,6 33,6" stroke-dasharray="{DASHES[place % len(DASHES)]}"/>{_marker(place, 17, 6)}'
        "</g></svg>"
    )


def threshold_key() -> Markup:
    """The sign of the line from which on it leaks."""
    return Markup(
        '<svg class="key" viewBox="0 0 34 12" aria-hidden="true"><line class="threshold" x1="1" x2="33" y1="6" y2="6"/>'
        "</svg>"
    )


def gauge(figure: Figure) -> Markup:
    """Where a value lies between chance, on the left, and everything in clear, on the right."""
    reached = round(100 * progress(figure), 1)
    fill = "informs" if figure.leaks is None else "leaking" if figure.leaking else "held"
    parts = [
        '<svg class="gauge" viewBox="0 0 100 14" preserveAspectRatio="none" aria-hidden="true">',
        '<rect class="track" x="0" y="4" width="100" height="6" rx="1"/>',
        f'<rect class="{fill}" x="0" y="4" width="{max(reached, 1.5)}" height="6" rx="1"/>',
    ]
    if figure.leaks is not None:
        mark = round(100 * progress(structs.replace(figure, value=figure.leaks)), 1)
        parts.append(f'<line class="mark" x1="{mark}" x2="{mark}" y1="0" y2="14"/>')
    return Markup("".join(parts) + "</svg>")  # noqa: S704 - numbers only


def _spaced(ticks: list[float], axis: _Axis) -> list[float]:
    """Those of ``ticks`` whose labels do not touch."""
    kept = ticks[:1]
    for _, tick in pairwise(ticks):
        if axis(tick) - axis(kept[-1]) >= LABEL_SPACE:
            kept.append(tick)
    return kept


def _marker(place: int, x: float, y: float) -> str:
    shapes = (
        f'<circle cx="{x}" cy="{y}" r="4"/>',
        f'<rect x="{x - 3.5}" y="{y - 3.5}" width="7" height="7"/>',
        f'<path d="M{x},{y - 5} l5,5 -5,5 -5,-5z"/>',
        f'<path d="M{x},{y - 5} l5,9 -10,0z"/>',
    )
    return shapes[place % len(shapes)]
