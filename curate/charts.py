"""Inline SVG charts for the report: histograms, curves and their marks, in colours that follow the page's theme.

Drawn by hand because the page holds its charts in itself: a plotting library adds megabytes of script to every page, or
a dependency that draws one theme only. Classes (`all`, `kept`, `mark` …) are coloured by the page's style sheet.
Every text goes through `escape`.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

WIDTH, HEIGHT = 440, 200
LEFT, RIGHT, TOP, BOTTOM = 44, 12, 14, 26


@dataclass(frozen=True)
class Line:
    """A curve. kind: its class in the style sheet."""

    label: str
    xs: Sequence[float]
    ys: Sequence[float]
    kind: str


@dataclass(frozen=True)
class Axis:
    """A scale from data to pixels; log for values that span decades."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """Place a value."""
        low, high, value = (math.log10(max(v, 1e-12)) if self.log else v for v in (self.low, self.high, value))
        return self.start + (self.end - self.start) * ((value - low) / (high - low) if high > low else 0.5)

    def ticks(self, number: int) -> list[float]:
        """Choose round values inside the scale."""
        if self.log:
            decades = range(math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9) + 1)
            step = max(1, math.ceil(len(decades) / number))
            return [10.0**exponent for exponent in decades][::step]
        span = self.high - self.low
        if not span > 0:
            return [self.low]
        rough = float(span / number)
        unit = 10.0 ** float(math.floor(math.log10(rough)))
        step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= rough)
        first = math.ceil(self.low / step - 1e-9)
        return [index * step for index in range(first, math.floor(self.high / step + 1e-9) + 1)]


def short(value: float) -> str:
    """Write a number for an axis: 1.2k, 3M, 0.25."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.4g}"


def histogram(
    edges: Sequence[float],
    everything: Sequence[int],
    kept: Sequence[int],
    label: str,
    bands: Sequence[tuple[float | None, float | None, str]] = (),
) -> Markup:
    """Draw how all rows and the kept ones are spread over a score, each as shares of their own number.

    edges: n + 1 bin edges; everything, kept: n counts. bands: (from, to, title) of stretches to mark, open where None.
    """
    x = Axis(edges[0], edges[-1], LEFT, WIDTH - RIGHT)
    shares = [[count / max(1, sum(counts)) for count in counts] for counts in (everything, kept)]
    y = Axis(0, max(map(max, shares)) or 1, HEIGHT - BOTTOM, TOP)
    parts = [_grid(x, y, lambda value: f"{value:.1%}" if y.high < 0.1 else f"{value:.0%}")]
    for low, high, title in bands:
        left, right = (
            x(min(max(v, x.low), x.high)) for v in (x.low if low is None else low, x.high if high is None else high)
        )
        parts.append(
            Markup('<g class="band"><title>{}</title><rect x="{:.1f}" y="{}" width="{:.1f}" height="{}"/>').format(
                title, left, TOP, max(1.5, right - left), HEIGHT - BOTTOM - TOP
            )
        )
        sides = [side for side, bound in ((left, low), (right, high)) if bound is not None]
        parts += [_upright(side) for side in sides] + [Markup("</g>")]
    for kind, values in zip(("all", "kept"), shares, strict=True):
        path = f"M{x(edges[0]):.1f} {y(0):.1f}"
        for low, high, value in zip(edges[:-1], edges[1:], values, strict=True):
            path += f"V{y(value):.1f}H{x(high):.1f}" if value or low else f"H{x(high):.1f}"
        parts.append(Markup('<path class="area {}" d="{}V{:.1f}Z"/>').format(kind, path, y(0)))
    return _svg(parts, label)


def curves(
    lines: Sequence[Line],
    label: str,
    *,
    log_x: bool = False,
    log_y: bool = False,
    mark: float | None = None,
    from_zero: bool = False,
    identity: str = "",
) -> Markup:
    """Draw curves over common axes. mark: an x to mark. identity: an id by which the page's script finds the chart."""
    xs, ys = [v for line in lines for v in line.xs], [v for line in lines for v in line.ys]
    x = Axis(min(xs), max(xs), LEFT, WIDTH - RIGHT, log_x)
    y = Axis(0 if from_zero else min(ys), max(ys), HEIGHT - BOTTOM, TOP, log_y)
    parts = [_grid(x, y, short)]
    for line in lines:
        points = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in zip(line.xs, line.ys, strict=True))
        parts.append(
            Markup('<polyline class="line {}" points="{}"><title>{}</title></polyline>').format(
                line.kind, points, line.label
            )
        )
    if mark is not None:
        parts.append(Markup('<g class="band">{}</g>').format(_upright(x(min(max(mark, x.low), x.high)))))
    if identity:
        parts.append(Markup('<circle class="dot" r="5" cx="-9" cy="-9"/>'))
    return _svg(parts, label, identity)


def _upright(place: float) -> Markup:
    return Markup('<line class="mark" x1="{0:.1f}" x2="{0:.1f}" y1="{1}" y2="{2}"/>').format(
        place, TOP, HEIGHT - BOTTOM
    )


def _grid(x: Axis, y: Axis, write: Callable[[float], str]) -> Markup:
    """Draw the axes' ticks, their numbers and light lines."""
    parts = []
    for value in y.ticks(4):
        line = '<line class="grid" x1="{0}" x2="{1}" y1="{2:.1f}" y2="{2:.1f}"/>'
        parts.append(Markup(line).format(LEFT, WIDTH - RIGHT, y(value)))
        parts.append(
            Markup('<text x="{}" y="{:.1f}" class="num">{}</text>').format(LEFT - 6, y(value) + 4, write(value))
        )
    for value in x.ticks(5):
        parts.append(
            Markup('<text x="{:.1f}" y="{}" class="tick">{}</text>').format(x(value), HEIGHT - 8, short(value))
        )
    return Markup("").join(parts)


def _svg(parts: Sequence[Markup], label: str, identity: str = "") -> Markup:
    name = Markup(' id="{}"').format(identity) if identity else ""
    return Markup('<svg{} viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        name, WIDTH, HEIGHT, escape(label), Markup("").join(parts)
    )
