"""Two charts as inline SVG: lines over steps, and dots with intervals.

Colours, fonts and the dark scheme are CSS (page.css.j2); the SVG holds geometry and classes. Every point has a <title>,
which browsers show on hover and screen readers read. Lengths are in units of the viewBox, about one CSS pixel on a
desktop.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

Point = tuple[float, float]

WIDTH, HEIGHT = 640, 320
LEFT, RIGHT, TOP, BOTTOM = 54, 14, 12, 42
COLOURS = 8
# More than this many points on a line cannot be told apart at WIDTH, and make the page heavy.
MAX_LINE, MAX_HOVER = 400, 80


@dataclass
class Series:
    """One line: `points` (x, y) in order of x, and `marks`, rings on top of it that are not joined."""

    label: str
    points: list[Point]
    colour: int
    dashed: bool = False
    marks: Sequence[Point] = ()


@dataclass
class Dot:
    """One row of the dot chart; `low` and `high` are None where there is no interval."""

    label: str
    value: float
    low: float | None
    high: float | None
    colour: int
    text: str


def line_chart(
    series: list[Series],
    title: str,
    y_range: Point | None = None,
    y_format: Callable[[float], str] | None = None,
) -> Markup:
    """Return the chart and its legend. A line of 24 points or more is drawn faint, with its moving average on top.

    `y_range` fixes the axis; otherwise it spans the data. `y_format` writes the tick labels and hover values.
    """
    everything = [point for line in series for point in (*line.points, *line.marks)]
    xs, ys = [x for x, _ in everything], [y for _, y in everything]
    x_ticks, y_ticks = ticks(min(xs), max(xs)), ticks(*(y_range or (min(ys), max(ys))))
    x_span = _widen(min(xs), max(xs))
    y_span = y_range or (y_ticks[0], y_ticks[-1])
    px = _scale(x_span, (LEFT, WIDTH - RIGHT))
    py = _scale(y_span, (HEIGHT - BOTTOM, TOP))
    label = y_format or _tick_format(y_ticks)
    value = y_format or (lambda y: f"{y:.4g}")

    parts = [Markup('<svg class="chart" role="img" aria-label="{}" viewBox="0 0 {} {}">').format(title, WIDTH, HEIGHT)]
    for y in y_ticks:
        parts.append(_line("grid", LEFT, py(y), WIDTH - RIGHT, py(y)))
        parts.append(_text("tick end", LEFT - 8, py(y) + 4, label(y)))
    x_label = _tick_format(x_ticks)
    for x in x_ticks:
        if x_span[0] <= x <= x_span[1]:
            parts.append(_line("tick-mark", px(x), HEIGHT - BOTTOM, px(x), HEIGHT - BOTTOM + 5))
            parts.append(_text("tick middle", px(x), HEIGHT - BOTTOM + 19, x_label(x)))
    parts.append(_line("axis", LEFT, HEIGHT - BOTTOM, WIDTH - RIGHT, HEIGHT - BOTTOM))
    parts.append(_text("tick middle", (LEFT + WIDTH - RIGHT) / 2, HEIGHT - 5, "step"))
    for line in series:
        parts += _draw(line, px, py, value)
    parts.append(Markup("</svg>"))
    return Markup("").join([*parts, _legend(series)])


def dot_chart(
    dots: list[Dot],
    title: str,
    x_format: Callable[[float], str],
    limits: Point,
    band: Dot | None = None,
    zero: bool = False,
) -> Markup:
    """Return one row a dot, its interval as a bar; `band` shades one dot's interval through all rows to compare with.

    The axis spans the data, cut at `limits`: dots, unlike bars, need not start at 0. `zero` draws a line there, for
    differences.
    """
    left, right, row = 182, 78, 34
    height = TOP + row * len(dots) + BOTTOM - 10
    bounds = [bound for dot in dots for bound in (dot.value, dot.low, dot.high) if bound is not None]
    bounds += [0.0] if zero else []
    marks = ticks(max(limits[0], min(bounds)), min(limits[1], max(bounds)))
    px = _scale((marks[0], marks[-1]), (left, WIDTH - right))
    bottom = TOP + row * len(dots)

    parts = [Markup('<svg class="chart" role="img" aria-label="{}" viewBox="0 0 {} {}">').format(title, WIDTH, height)]
    if band and band.low is not None and band.high is not None:
        width = px(band.high) - px(band.low)
        parts.append(
            Markup('<rect class="band" x="{:.1f}" y="{}" width="{:.1f}" height="{}"/>').format(
                px(band.low), TOP, width, bottom - TOP
            )
        )
    for x in marks:
        parts.append(_line("grid", px(x), TOP, px(x), bottom))
        parts.append(_text("tick middle", px(x), bottom + 19, x_format(x)))
    if zero:
        parts.append(_line("axis zero", px(0), TOP, px(0), bottom))
    parts.append(_line("axis", left, bottom, WIDTH - right, bottom))
    for position, dot in enumerate(dots):
        y = TOP + row * (position + 0.5)
        parts.append(_group(dot.colour))
        parts.append(_text("name end", left - 12, y + 4, _shorten(dot.label)))
        if dot.low is not None and dot.high is not None:
            parts.append(_line("interval", px(dot.low), y, px(dot.high), y))
            parts += [_line("interval", px(x), y - 5, px(x), y + 5) for x in (dot.low, dot.high)]
        parts.append(_circle("dot", px(dot.value), y, 5.5, f"{dot.label}: {dot.text}"))
        parts.append(_text("value", WIDTH - right + 12, y + 4, dot.text.split(" [")[0]))
        parts.append(Markup("</g>"))
    return Markup("").join([*parts, Markup("</svg>")])


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Return about `about` round numbers (1, 2 or 5 times a power of ten apart) that enclose [low, high]."""
    low, high = _widen(low, high)
    rough = (high - low) / about
    power = 10 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [position * step for position in range(first, last + 1)]


def smooth(points: list[Point], span: int) -> list[Point]:
    """Return the exponential moving average over about `span` points, without the pull of its start towards 0."""
    keep = 1 - 2 / (span + 1)
    total = weight = 0.0
    result = []
    for x, y in points:
        total, weight = keep * total + y, keep * weight + 1
        result.append((x, total / weight))
    return result


def _draw(line: Series, px: Callable, py: Callable, value: Callable[[float], str]) -> list[Markup]:
    parts = [_group(line.colour)]
    span = len(line.points) // 12
    if span >= 2:
        parts.append(_path("raw", line.points, px, py))
    parts.append(_path("line dashed" if line.dashed else "line", smooth(line.points, max(span, 1)), px, py))
    for x, y in _thin(line.points, MAX_HOVER):
        parts.append(_circle("hover", px(x), py(y), 6, f"{line.label}, step {x:g}: {value(y)}"))
    for x, y in line.marks:
        parts.append(_circle("mark", px(x), py(y), 4, f"{line.label}, step {x:g}, evaluation: {value(y)}"))
    return [*parts, Markup("</g>")]


def _legend(series: list[Series]) -> Markup:
    entry = Markup(
        '<li style="--c: var(--run-{})"><svg viewBox="0 0 26 8" aria-hidden="true">'
        '<path class="{}" d="M0 4H26"/></svg>{}</li>'
    )
    entries = [entry.format(s.colour % COLOURS, "line dashed" if s.dashed else "line", s.label) for s in series]
    return Markup('<ul class="legend">{}</ul>').format(Markup("").join(entries))


def _group(colour: int) -> Markup:
    return Markup('<g style="--c: var(--run-{})">').format(colour % COLOURS)


def _path(kind: str, points: list[Point], px: Callable, py: Callable) -> Markup:
    d = "M" + "L".join(f"{px(x):.1f} {py(y):.1f}" for x, y in _thin(points, MAX_LINE)) if points else ""
    return Markup('<path class="{}" d="{}"/>').format(kind, d)


def _line(kind: str, x1: float, y1: float, x2: float, y2: float) -> Markup:
    return Markup('<path class="{}" d="M{:.1f} {:.1f}L{:.1f} {:.1f}"/>').format(kind, x1, y1, x2, y2)


def _text(kind: str, x: float, y: float, text: str) -> Markup:
    return Markup('<text class="{}" x="{:.1f}" y="{:.1f}">{}</text>').format(kind, x, y, text)


def _circle(kind: str, x: float, y: float, radius: float, title: str) -> Markup:
    circle = Markup('<circle class="{}" cx="{:.1f}" cy="{:.1f}" r="{}"><title>{}</title></circle>')
    return circle.format(kind, x, y, radius, title)


def _scale(source: Point, target: Point) -> Callable[[float], float]:
    factor = (target[1] - target[0]) / (source[1] - source[0])
    return lambda value: target[0] + (value - source[0]) * factor


def _widen(low: float, high: float) -> Point:
    """Give a range without extent one, so that a single point has a place on its axis."""
    margin = 0 if high > low else max(abs(low) * 0.05, 0.05)
    return low - margin, high + margin


def _tick_format(marks: list[float]) -> Callable[[float], str]:
    decimals = max(0, -math.floor(math.log10(marks[1] - marks[0]) + 1e-9))
    return lambda value: f"{value:,.{decimals}f}"


def _thin(points: list[Point], most: int) -> list[Point]:
    stride = math.ceil(len(points) / most)
    return points if stride <= 1 else [*points[::stride], points[-1]]


def _shorten(text: str, most: int = 21) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"
