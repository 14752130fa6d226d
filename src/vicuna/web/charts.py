"""Charts as HTML: curves over steps, and a histogram with a cutoff.

The plot is an SVG that is stretched to whatever room there is; its lines keep their width, and the
words around it are HTML, so that they keep their size on a phone. Colours are those of the theme
(`style.css`), light or dark; nothing is fetched, and no script runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from markupsafe import Markup

from vicuna.web.render import join, render

POINTS = 300  # of a curve: more are no wider than a pixel
BANDS = 60  # places over which the mouse tells the numbers
COLOURS = 6


@dataclass(frozen=True)
class Curve:
    """Points of one kind, in the order of x.

    kind: `line`; `faint`, behind the lines and not counted where the range of y is chosen; `dots`,
    a line through marked points. colour: from 0.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    kind: str = "line"
    colour: int = 0


def plain(value: float) -> str:
    """A number as short as it can be read."""
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def curves(
    found: Sequence[Curve],
    title: str,
    x_label: str,
    x_end: float = 0.0,
    number: Callable[[float], str] = plain,
) -> Markup:
    """Curves over steps; "" where there is no point yet.

    Args:
        x_end: how far x goes at least: a run's last step.
        number: how a value is written that the mouse points at.
    """
    drawn = [_finite(curve) for curve in found]
    drawn = [curve for curve in drawn if curve.x]
    if not drawn:
        return Markup()
    low, high = _range(drawn)
    ticks = _ticks(low, high)
    low, high = min(low, ticks[0]), max(high, ticks[-1])
    x_low = min(curve.x[0] for curve in drawn)
    x_low = 0.0 if x_low <= 1 else x_low
    x_high = max(x_end, *(curve.x[-1] for curve in drawn))
    x_high = x_high if x_high > x_low else x_low + 1
    frame = _Frame(x_low, x_high, low, high)
    across = [t for t in _ticks(x_low, x_high, 5) if x_low <= t <= x_high]
    return render(
        "charts.curves", title=title, x_label=x_label,
        legend=[(f"{c.kind} {_colour(c)}", c.name) for c in drawn if c.name],
        y_ticks=[(f"{frame.y(t) / 10:.2f}", plain(t)) for t in ticks],
        grid=[f"{frame.y(t):.1f}" for t in ticks],
        paths=[path for curve in drawn for path in _paths(curve, frame)],
        bands=_bands(drawn, frame, x_label, number),
        x_ticks=[(f"{frame.x(t) / 10:.2f}", f"{t:,.6g}") for t in across],
    )  # fmt: skip


def histogram(counts: Sequence[int], limit: int, cutoff: int, title: str, x_label: str) -> Markup:
    """How many examples are how long; what lies beyond the cutoff is marked.

    Args:
        counts: bars of equal width from 0 to `limit`; the last holds all longer ones too.
    """
    most = max(counts, default=0) or 1
    width = 1000 / max(1, len(counts))
    bars, bands = [], []
    step = limit / max(1, len(counts))
    for i, count in enumerate(counts):
        height = 985 * count / most
        height = max(height, 8.0) if count else 0.0
        beyond = " beyond" if (i + 1) * step > cutoff + 1e-9 else ""
        bars.append(
            (f"bar{beyond}", f"{i * width + 0.08 * width:.2f}", f"{1000 - height:.1f}",
             f"{0.84 * width:.2f}", f"{height:.1f}")
        )  # fmt: skip
        last = "+" if i == len(counts) - 1 else ""
        span = f"{i * step + 1:,.0f}–{(i + 1) * step:,.0f}{last}"
        inner = render("charts.count", count=f"{count:,}", range=span)
        bands.append(_band(i * width / 10, width / 10, inner, line=False))
    ticks = [t for t in _ticks(0, limit, 5) if t <= limit]
    place = min(100.0, 100 * cutoff / limit)
    return render(
        "charts.histogram", title=title, x_label=x_label, bars=bars, bands=join(bands),
        cut_side=" right" if place > 75 else "", cut_place=f"{place:.2f}", cutoff=f"{cutoff:,}",
        x_ticks=[(f"{100 * t / limit:.2f}", f"{t:,.0f}") for t in ticks],
    )  # fmt: skip


@dataclass(frozen=True)
class _Frame:
    """From numbers to a square of 1000 by 1000, y downwards."""

    x_low: float
    x_high: float
    y_low: float
    y_high: float

    def x(self, value: float) -> float:
        return 1000 * (value - self.x_low) / (self.x_high - self.x_low)

    def y(self, value: float) -> float:
        inside = min(max(value, self.y_low), self.y_high)
        return 1000 * (1 - (inside - self.y_low) / (self.y_high - self.y_low))


def _finite(curve: Curve) -> Curve:
    """The points that are numbers, thinned where there are too many for the eye."""
    pairs = [(x, y) for x, y in zip(curve.x, curve.y) if math.isfinite(x) and math.isfinite(y)]
    if curve.kind != "dots" and len(pairs) > POINTS:
        step = len(pairs) / POINTS
        # The newest point is always among them.
        pairs = [pairs[min(len(pairs), math.ceil((i + 1) * step)) - 1] for i in range(POINTS)]
    return Curve(curve.name, [p[0] for p in pairs], [p[1] for p in pairs], curve.kind, curve.colour)


def _range(drawn: Sequence[Curve]) -> tuple[float, float]:
    """What y spans: a few wild points of a faint curve must not flatten all others."""
    shown = [y for curve in drawn if curve.kind != "faint" for y in curve.y]
    faint = sorted(y for curve in drawn if curve.kind == "faint" for y in curve.y)
    shown += faint[len(faint) // 50 : len(faint) - len(faint) // 50]
    low, high = min(shown), max(shown)
    room = (high - low) * 0.05 or abs(high) * 0.05 or 1.0
    return (max(0.0, low - room) if low >= 0 else low - room), high + room


def _ticks(low: float, high: float, about: int = 4) -> list[float]:
    """Round numbers that span low to high."""
    rough = (high - low) / about or 1.0
    power = 10 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def _colour(curve: Curve) -> str:
    return f"c{curve.colour % COLOURS}"


def _paths(curve: Curve, frame: _Frame) -> list[tuple[str, str]]:
    """(class, d) of the SVG paths of a curve."""
    points = [f"{frame.x(x):.1f} {frame.y(y):.1f}" for x, y in zip(curve.x, curve.y)]
    paths = [(f"{curve.kind} {_colour(curve)}", f"M{'L'.join(points)}")]
    if curve.kind == "dots" or len(points) == 1:
        # A line of no length with round ends: a dot that stays round in a stretched picture.
        paths.append((f"dot {_colour(curve)}", "".join(f"M{p}h0" for p in points)))
    return paths


def _bands(
    drawn: Sequence[Curve], frame: _Frame, x_label: str, number: Callable[[float], str]
) -> Markup:
    """Strips over the plot that tell the numbers below the mouse."""
    places = sorted({x for curve in drawn for x in curve.x})
    if len(places) > BANDS:
        places = [places[round(i * (len(places) - 1) / (BANDS - 1))] for i in range(BANDS)]
    edges = [(a + b) / 2 for a, b in pairwise(places)]
    bands = []
    for i, x in enumerate(places):
        begin = frame.x(edges[i - 1]) / 10 if i else 0.0
        end = frame.x(edges[i]) / 10 if i < len(edges) else 100.0
        values = [
            (f"{curve.kind} {_colour(curve)}", f"{curve.name or ''} {number(y)}")
            for curve in drawn
            if (y := _at(curve, x, frame)) is not None
        ]
        inner = render("charts.values", title=f"{x_label} {x:,.6g}", values=values)
        bands.append(_band(begin, end - begin, inner, at=frame.x(x) / 10))
    return join(bands)


def _at(curve: Curve, x: float, frame: _Frame) -> float | None:
    """A curve's value at x: that of its nearest point, if one is near."""
    nearest = min(range(len(curve.x)), key=lambda i: abs(curve.x[i] - x))
    near = abs(curve.x[nearest] - x) <= (frame.x_high - frame.x_low) / BANDS
    return curve.y[nearest] if near else None


def _band(
    left: float, width: float, inner: Markup, at: float | None = None, line: bool = True
) -> Markup:
    middle = left + width / 2 if at is None else at
    mark = f"{100 * (middle - left) / (width or 1):.1f}" if line else None
    return render(
        "charts.band", side=" right" if middle > 60 else "", left=f"{left:.2f}",
        width=f"{width:.2f}", mark=mark, inner=inner,
    )  # fmt: skip
