"""Inline SVG charts for the report: histograms, curves, maps and intervals, in colours that follow the page's theme.

Written by hand, so that a figure can be interactive, follows both themes and opens without a network. Compared with the
libraries that could do it (2026-11): plotly 7.1 adds 4.8 MB of script to every page and bokeh 3.9 1.3 MB; matplotlib
3.11 adds 110 MB to the installation and 1.4 s to the import, writes 16 kB for a histogram (here: 2 kB) and 665 kB for a
map of a thousand circles (here: 110 kB), in the colours of one theme and without titles on its parts.

Classes (`all`, `kept`, `mark` …) are coloured by the page's style sheet. Every text goes through `escape`.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

WIDTH, HEIGHT, MAP_HEIGHT = 440, 200, 320
LEFT, RIGHT, TOP, BOTTOM = 44, 12, 14, 26
CELL, CELL_HEIGHT = 240, 34


@dataclass(frozen=True)
class Line:
    """A curve. kind: its class in the style sheet."""

    label: str
    xs: Sequence[float]
    ys: Sequence[float]
    kind: str


@dataclass(frozen=True)
class Window:
    """The range of an axis that is kept: from low to high, open where None. control: id of what moves its ends."""

    low: float | None
    high: float | None
    title: str
    control: str = ""


@dataclass(frozen=True)
class Spot:
    """A circle of a map: its place, the size of its area, its class, what it says, and where it leads (an id)."""

    x: float
    y: float
    size: float
    kind: str
    title: str
    target: str = ""


@dataclass(frozen=True)
class Interval:
    """A row of an interval chart: a mean and the two ends around it."""

    label: str
    mean: float
    low: float
    high: float
    kind: str = "kept"


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

    def inside(self, value: float) -> float:
        """Place a value, or the nearest that is on the scale."""
        return self(min(max(value, self.low), self.high))

    def ticks(self, number: int) -> list[float]:
        """Choose round values inside the scale."""
        if self.log:
            decades = range(math.floor(math.log10(self.low)), math.floor(math.log10(self.high) + 1e-9) + 1)
            fine = (1, 2, 5) if len(decades) <= 2 else (1,)
            every = [10.0**exponent * factor for exponent in decades for factor in fine]
            inside = [value for value in every if self.low * (1 - 1e-9) <= value <= self.high * (1 + 1e-9)]
            return inside[:: max(1, math.ceil(len(inside) / number))]
        span = self.high - self.low
        if not span > 0:
            return [self.low]
        rough = float(span / number)
        unit = 10.0 ** float(math.floor(math.log10(rough)))
        step = next(unit * factor for factor in (1, 2, 2.5, 5, 10) if unit * factor >= rough)
        first = math.ceil(self.low / step - 1e-9)
        return [index * step for index in range(first, math.floor(self.high / step + 1e-9) + 1)]


def short(value: float) -> str:
    """Write a number for an axis: 1.2k, 3M, 0.25."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}".replace("-", "−")
    return f"{value:.4g}".replace("-", "−")


def histogram(
    edges: Sequence[float],
    everything: Sequence[int],
    kept: Sequence[int],
    label: str,
    window: Window | None = None,
) -> Markup:
    """Draw how all rows and the kept ones are spread over a score, each as shares of their own number.

    edges: n + 1 bin edges; everything, kept: n counts, or none for kept. window: the stretch that a step left.
    """
    x = Axis(edges[0], edges[-1], LEFT, WIDTH - RIGHT)
    shares = [[count / max(1, sum(counts)) for count in counts] for counts in (everything, kept) if counts]
    y = Axis(0, max(map(max, shares)) or 1, HEIGHT - BOTTOM, TOP)
    parts = [_grid(x, y, lambda value: f"{value:.1%}" if y.high < 0.1 else f"{value:.0%}")]
    for kind, values in zip(("all", "kept"), shares, strict=False):
        path = f"M{x(edges[0]):.1f} {y(0):.1f}"
        for low, high, value in zip(edges[:-1], edges[1:], values, strict=True):
            path += f"V{y(value):.1f}H{x(high):.1f}" if value or low else f"H{x(high):.1f}"
        parts.append(Markup('<path class="area {}" d="{}V{:.1f}Z"/>').format(kind, path, y(0)))
    if window is not None:
        parts.append(_window(x, window))
    return _svg(parts, label, x, window.control if window else "")


def curves(
    lines: Sequence[Line],
    label: str,
    *,
    log_x: bool = False,
    log_y: bool = False,
    window: Window | None = None,
    from_zero: bool = False,
    ticks: Mapping[float, str] | None = None,
) -> Markup:
    """Draw curves over common axes; with a window, a dot can follow the first of them. ticks: of the x axis, named."""
    xs, ys = [v for line in lines for v in line.xs], [v for line in lines for v in line.ys]
    x = Axis(min(xs), max(xs), LEFT, WIDTH - RIGHT, log_x)
    y = Axis(0 if from_zero else min(ys), max(ys), HEIGHT - BOTTOM, TOP, log_y)
    parts = [_grid(x, y, short, ticks)]
    for line in lines:
        points = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in zip(line.xs, line.ys, strict=True))
        parts.append(
            Markup('<polyline class="line {}" points="{}"><title>{}</title></polyline>').format(
                line.kind, points, line.label
            )
        )
    if window is not None:
        parts += [_window(x, window), Markup('<circle class="dot" r="5" cx="-9" cy="-9"/>')]
    return _svg(parts, label, x, window.control if window else "")


def scatter(spots: Iterable[Spot], label: str) -> Markup:
    """Draw a map: circles whose area is their size, the largest underneath. Its axes have no unit and are left out."""
    spots = sorted(spots, key=lambda spot: -spot.size)
    ends = [[(min(values), max(values))] for values in ([s.x for s in spots], [s.y for s in spots])]
    x, y = (Axis(*ends[0][0], 24, WIDTH - 24), Axis(*ends[1][0], MAP_HEIGHT - 24, 24))
    total = sum(spot.size for spot in spots) or 1
    scale = min(26 / math.sqrt(spots[0].size or 1), math.sqrt(0.16 * WIDTH * MAP_HEIGHT / total / math.pi))
    parts = []
    for spot in spots:
        circle = Markup('<circle class="spot {}" cx="{:.1f}" cy="{:.1f}" r="{:.1f}"><title>{}</title></circle>').format(
            spot.kind, x(spot.x), y(spot.y), max(1.5, scale * math.sqrt(spot.size)), spot.title
        )
        link = Markup('<a href="#{}" aria-label="{}">{}</a>').format(spot.target, spot.title, circle)
        parts.append(link if spot.target else circle)
    return _svg(parts, label, height=MAP_HEIGHT, role="group")  # an image would hide its links from a screen reader


def forest(rows: Sequence[Interval | None]) -> tuple[list[Markup], Markup]:
    """Draw means with the interval around each as the cells of a table's column, and the scale that they share.

    Zero is on the scale and marked in every cell; a row that is None has only that mark. Empty if all rows are None.
    """
    ends = [end for row in rows if row for end in (row.low, row.high)]
    if not ends:
        return [Markup("")] * len(rows), Markup("")
    low, high = min(0.0, *ends), max(0.0, *ends)
    margin = 0.04 * (high - low) or 0.5
    x = Axis(low - margin, high + margin, 0, CELL)
    ticks = x.ticks(4)
    lines = Markup("").join(
        Markup('<line class="{}" x1="{:.1f}" x2="{:.1f}" y1="-99" y2="199"/>').format(  # through cells of any height
            "grid" if tick else "axis", x(tick), x(tick)
        )
        for tick in ticks
    )
    cells = [_cell(lines + _interval(row, x) if row else lines, row.label if row else "the reference") for row in rows]
    # A number that would stand out of the cell is left out.
    shown = [tick for tick in ticks if 0.04 * CELL < x(tick) < 0.96 * CELL]
    numbers = (Markup('<text x="{:.1f}" y="15" class="tick">{}</text>').format(x(v), short(v)) for v in shown)
    return cells, _cell(Markup("").join(numbers), "the scale")


def _interval(row: Interval, x: Axis) -> Markup:
    """Draw one mean and the interval around it."""
    drawn = (
        '<g class="interval {0}"><title>{1}: {2:.4g} ({3:.4g} to {4:.4g})</title>'
        '<line x1="{5:.1f}" x2="{6:.1f}" y1="{8}" y2="{8}"/><circle cx="{7:.1f}" cy="{8}" r="4.5"/></g>'
    )
    ends = (x(row.low), x(row.high), x(row.mean))
    return Markup(drawn).format(row.kind, row.label, row.mean, row.low, row.high, *ends, CELL_HEIGHT / 2)


def _cell(inside: Markup, label: str) -> Markup:
    return Markup('<svg class="cell" viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        CELL, CELL_HEIGHT, label, inside
    )


def _window(x: Axis, window: Window) -> Markup:
    """Draw the range that is kept, with a grip at each end that is not open."""
    left, right = (x.inside(bound) for bound in (_or(window.low, x.low), _or(window.high, x.high)))
    parts = [
        Markup('<title>{}</title><rect class="stay" x="{:.1f}" y="{}" width="{:.1f}" height="{}"/>').format(
            window.title, left, TOP, max(1.5, right - left), HEIGHT - BOTTOM - TOP
        )
    ]
    for end, place, bound in (("low", left, window.low), ("high", right, window.high)):
        if bound is not None:
            grip = (
                '<g class="grip" data-end="{}" transform="translate({:.1f})"><line class="mark" y1="{}" y2="{}"/>'
                '<path class="knob" d="M-6 {} h12 v9 l-6 6 l-6 -6 z"/></g>'
            )
            parts.append(Markup(grip).format(end, place, TOP, HEIGHT - BOTTOM, TOP - 8))
    return Markup('<g class="band">{}</g>').format(Markup("").join(parts))


def _or(bound: float | None, end: float) -> float:
    return end if bound is None else bound


def _grid(x: Axis, y: Axis, write: Callable[[float], str], ticks: Mapping[float, str] | None = None) -> Markup:
    """Draw the axes' ticks, their numbers and light lines."""
    parts = []
    for value in y.ticks(4):
        line = '<line class="grid" x1="{0}" x2="{1}" y1="{2:.1f}" y2="{2:.1f}"/>'
        parts.append(Markup(line).format(LEFT, WIDTH - RIGHT, y(value)))
        parts.append(
            Markup('<text x="{}" y="{:.1f}" class="num">{}</text>').format(LEFT - 6, y(value) + 4, write(value))
        )
    for value, name in (ticks or {value: short(value) for value in x.ticks(5)}).items():
        parts.append(Markup('<text x="{:.1f}" y="{}" class="tick">{}</text>').format(x(value), HEIGHT - 8, name))
    return Markup("").join(parts)


def _svg(
    parts: Sequence[Markup],
    label: str,
    x: Axis | None = None,
    control: str = "",
    height: float = HEIGHT,
    role: str = "img",
) -> Markup:
    """Wrap the parts; an interactive chart names its control and its scale."""
    scale = ""
    if x is not None and control:
        scale = Markup(' data-control="{}" data-low="{!r}" data-high="{!r}" data-start="{}" data-end="{}"').format(
            control, float(x.low), float(x.high), x.start, x.end
        )
    return Markup('<svg viewBox="0 0 {} {}" role="{}" aria-label="{}"{}>{}</svg>').format(
        WIDTH, f"{height:g}", role, escape(label), scale, Markup("").join(parts)
    )
