"""The lab's charts: each takes plain numbers for its arms and returns one SVG. What they show is decided in panels.py."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from markupsafe import Markup

from curvelora_eval.lab.canvas import Axis, Canvas, linear_axis, log_axis, padded, short, thin
from curvelora_eval.lab.folder import Arm, per_step
from curvelora_eval.report.svg import Point, smooth

WIDTH = 440
# What can be told apart at this width; more points only make the page heavy.
MAX_LINE, MAX_HOVER = 220, 40
ROW = 35  # height of a row whose name stands above its mark


@dataclass
class Row:
    """One arm's value with an interval (None where there is none). `text` is what is written, `href` where it is from."""

    arm: Arm
    value: float
    low: float | None = None
    high: float | None = None
    text: str = ""
    href: str | None = None
    hollow: bool = False

    @property
    def bounds(self) -> list[float]:
        return [bound for bound in (self.value, self.low, self.high) if bound is not None]


@dataclass
class Curve:
    """One arm's line over steps. `seeds` holds (step, value) of each seed; the line is their median, the band min to max."""

    arm: Arm
    seeds: dict[str, list[Point]]
    name: str = ""
    dashed: bool = False
    href: str | None = None
    ends: dict[str, Point] = field(default_factory=dict)


def ratio_bars(rows: Sequence[Row], title: str, origin: float = 1.0, unit: str = "×") -> Markup:
    """Bars from `origin`: longer is more than the baseline. Intervals are whiskers."""
    left, right, top = 4, WIDTH - 10, 6
    bottom = top + ROW * len(rows) + 4
    canvas = Canvas(WIDTH, bottom + 24, title, "bars")
    bounds = [bound for row in rows for bound in row.bounds] + [origin]
    # A whole unit at least, so that a difference of a few per cent does not look like one of a factor.
    axis = linear_axis(min(bounds), max(*bounds, origin + 0.5 if unit == "×" else origin), (left, right))
    canvas.x_axis(axis, top, bottom)
    for position, row in enumerate(rows):
        y = top + ROW * position
        with canvas.arm(row.arm), canvas.link(row.href):
            canvas.text("name", left + 4, y + 14, row.arm.label)
            canvas.text("value end", right, y + 14, row.text)
            start, end = sorted((axis(origin), axis(row.value)))
            canvas.rect("bar", start, y + 19, end - start, 11, f"{row.arm.label}: {row.text}")
            if row.low is not None and row.high is not None:
                canvas.line("whisker", (axis(row.low), y + 24.5), (axis(row.high), y + 24.5))
                for bound in (row.low, row.high):
                    canvas.line("whisker", (axis(bound), y + 21), (axis(bound), y + 28))
            if row.arm.baseline:
                canvas.line("origin", (axis(origin), y + 17), (axis(origin), y + 32))
    canvas.line("origin thin", (axis(origin), top), (axis(origin), bottom))
    return canvas.svg()


def dot_rows(
    rows: Sequence[Row], title: str, log: bool = False, marks: Sequence[tuple[float, str]] = (), name: str = ""
) -> Markup:
    """One row an arm with its dots and intervals; `marks` are labelled vertical lines to compare with.

    Rows of the same arm that follow each other share a line.
    """
    left, right = 6, WIDTH - 10
    top = 6 + (16 if marks else 0)
    arms = list(dict.fromkeys(row.arm for row in rows))
    bottom = top + ROW * len(arms) + 4
    canvas = Canvas(WIDTH, bottom + (40 if name else 24), title, "dots")
    bounds = [bound for row in rows for bound in row.bounds] + [x for x, _ in marks]
    axis = _value_axis(bounds, (left + 6, right - 6), log)
    canvas.x_axis(axis, top, bottom, name)
    for x, text in marks:
        canvas.line("reference", (axis(x), top - 3), (axis(x), bottom))
        near_end = axis(x) > WIDTH * 0.6
        canvas.text("end" if near_end else "", axis(x) + (3 if near_end else -3), top - 8, text)
    for position, arm in enumerate(arms):
        y = top + ROW * position
        mine = [row for row in rows if row.arm == arm]
        with canvas.arm(arm):
            canvas.text("name", left, y + 14, arm.label)
            canvas.text("value end", right, y + 14, " / ".join(row.text for row in mine if row.text))
            for row in mine:
                with canvas.link(row.href):
                    _dot(canvas, axis, row, y + 25)
    return canvas.svg()


def _dot(canvas: Canvas, axis: Axis, row: Row, y: float) -> None:
    if row.low is not None and row.high is not None:
        canvas.line("interval", (axis(row.low), y), (axis(row.high), y))
        for bound in (row.low, row.high):
            canvas.line("interval", (axis(bound), y - 3.5), (axis(bound), y + 3.5))
    canvas.circle("dot hollow" if row.hollow else "dot", axis(row.value), y, 4.5, f"{row.arm.label}: {row.text}")


def _value_axis(bounds: list[float], target: Point, log: bool, about: int = 5) -> Axis:
    positive = [bound for bound in bounds if bound > 0]
    if log and positive:
        return log_axis(min(positive), max(positive), target)
    return linear_axis(min(bounds), max(bounds), target, about)


@dataclass
class SpikeRow:
    """One arm of the stability plot: its noise dots and, for each seed, the steps at which the loss spiked."""

    arm: Arm
    dots: list[Row]
    spikes: dict[str, list[float]]
    href: str | None = None


def noise_and_spikes(rows: Sequence[SpikeRow], steps: float, title: str) -> Markup:
    """Left: loss noise as dots with intervals. Right: spikes as ticks over steps, a lane for each seed."""
    middle, left, right, top = 214, 6, WIDTH - 12, 24
    bottom = top + ROW * len(rows) + 2
    canvas = Canvas(WIDTH, bottom + 42, title, "noise")
    bounds = [bound for row in rows for dot in row.dots for bound in dot.bounds]
    start = middle + 22
    time = linear_axis(0, max(steps, 1), (start, right), about=3, snug=True)
    if bounds:
        noise = linear_axis(min(0.0, *bounds), max(bounds), (left + 6, middle - 14), about=3)
        canvas.x_axis(noise, top, bottom, "loss noise")
    canvas.x_axis(time, top, bottom, "step")
    canvas.text("strong", left, 13, "Noise")
    total = sum(len(found) for row in rows for found in row.spikes.values())
    seeds = max((len(row.spikes) for row in rows), default=0)
    if seeds and not total:  # long, so it ends with the plot
        canvas.text(
            "strong end", right, 13, f"No spikes in {steps:,.0f} steps × {seeds} seed{'s' if seeds != 1 else ''}"
        )
    else:
        canvas.text("strong", start, 13, "Spikes")
    for position, row in enumerate(rows):
        y = top + ROW * position
        with canvas.arm(row.arm), canvas.link(row.href):
            canvas.text("name", left, y + 14, row.arm.label)
            for dot in row.dots:
                _dot(canvas, noise, dot, y + 25)
            count = sum(len(found) for found in row.spikes.values())
            if row.spikes and total:
                canvas.text("value end" if count else "end", right, y + 14, f"{count}" if count else "none")
            lanes = max(len(row.spikes), 1)
            for lane, (seed, found) in enumerate(row.spikes.items()):
                height = 12 / lanes
                lane_y = y + 19 + height * (lane + 0.5)
                canvas.line("lane", (start, lane_y), (right, lane_y))
                for step in found:
                    title_text = f"{row.arm.label}, seed {seed}: spike at step {step:,.0f}"
                    canvas.circle("spike", time(step), lane_y, max(2.2, min(height / 2, 3.5)), title_text)
    return canvas.svg()


def curves(
    lines: Sequence[Curve],
    title: str,
    y_span: Point | None = None,
    y_text: Callable[[float], str] | None = None,
    log: bool = False,
    smoothing: int = 1,
    size: Point = (WIDTH, 300),
    y_name: str = "",
) -> Markup:
    """Medians over seeds with bands from the smallest to the largest seed. `smoothing` is the span of the moving average.

    Lines are cut off at `y_span`; where it is not given it covers the smoothed medians and bands. A log axis has no place for
    values of 0 and below (a gradient of exactly zero), which are left out.
    """
    width, height = size
    left, right, top, bottom = 46, width - 12, 20 if y_name else 10, height - (40 if width > 300 else 22)
    if log:
        lines = [
            replace(line, seeds=positive(line.seeds), ends={seed: end for seed, end in line.ends.items() if end[1] > 0})
            for line in lines
        ]
    drawn = [(line, _summary(line, smoothing)) for line in lines]
    drawn = [(line, points) for line, points in drawn if points]
    xs = [x for _, points in drawn for x, *_ in points]
    ys = [y for _, points in drawn for _, *three in points for y in three]
    x_axis = linear_axis(min(xs), max(xs), (left, right), about=5 if width > 300 else 3, snug=True)
    if y_span:
        y_axis = linear_axis(*y_span, (bottom, top), snug=True)
    else:
        y_axis = _value_axis(ys, (bottom, top), log, about=5 if height > 200 else 3)
    text = y_text or short
    canvas = Canvas(width, height, title, "curves")
    labelled = Axis(y_axis.span, y_axis.target, y_axis.marks, y_axis.log)
    if y_text:
        labelled.label = y_text  # type: ignore[method-assign]
    canvas.y_axis(labelled, left, right, y_name)
    canvas.x_axis(x_axis, top, bottom, "step" if width > 300 else "", ticks_only=True)
    for line, points in drawn:
        with canvas.arm(line.arm), canvas.link(line.href):
            with canvas.window(left, top - 2, right + 2, bottom + 2):
                shown = thin(points, MAX_LINE)
                if len(line.seeds) > 1:
                    upper = [(x_axis(x), y_axis.free(high)) for x, _, _, high in shown]
                    canvas.area("band", upper, [(x_axis(x), y_axis.free(low)) for x, _, low, _ in shown])
                kind = "line dashed" if line.dashed else "line"
                canvas.line(kind, *[(x_axis(x), y_axis.free(middle)) for x, middle, _, _ in shown])
            for x, middle, low, high in thin(points, MAX_HOVER if width > 300 else MAX_HOVER // 3):
                if not y_axis.span[0] <= middle <= y_axis.span[1]:
                    continue
                name = f"{line.arm.label}{', ' + line.name if line.name else ''}, step {x:,.0f}: {text(middle)}"
                spread = f" ({text(low)} to {text(high)} over {len(line.seeds)} seeds)" if len(line.seeds) > 1 else ""
                canvas.circle("hover", x_axis(x), y_axis(middle), 6, name + spread)
            for seed, (x, y) in line.ends.items():
                cross = (x_axis(x), y_axis(y))
                _cross(canvas, *cross)
                canvas.circle("hover", *cross, 7, f"{line.arm.label}, seed {seed}: diverged at step {x:,.0f}")
    return canvas.svg()


def positive(seeds: dict[str, list[Point]]) -> dict[str, list[Point]]:
    """What a log axis can show of (step, value) per seed: values above 0, and the seeds that have any."""
    found = {seed: [(x, y) for x, y in points if y is not None and y > 0] for seed, points in seeds.items()}
    return {seed: points for seed, points in found.items() if points}


def _summary(line: Curve, smoothing: int) -> list[tuple[float, float, float, float]]:
    """(step, median, smallest, largest) over the seeds, each seed smoothed first."""
    seeds = {seed: smooth(points, smoothing) for seed, points in line.seeds.items() if points}
    rows = per_step(seeds, lambda values: (statistics.median(values), min(values), max(values)))
    return [(step, *three) for step, three in rows]


def _cross(canvas: Canvas, x: float, y: float, size: float = 4) -> None:
    canvas.line("cross", (x - size, y - size), (x + size, y + size))
    canvas.line("cross", (x - size, y + size), (x + size, y - size))


def stacked_bars(
    rows: Sequence[tuple[Arm, dict[str, float], str]], title: str, unit: str, href: str | None = None
) -> Markup:
    """One bar an arm, cut into named parts (in order, the same for all arms); the third item is the total in words."""
    left, right, top = 4, WIDTH - 10, 6
    bottom = top + ROW * len(rows) + 4
    canvas = Canvas(WIDTH, bottom + 42, title, "stacked")
    names = list(dict.fromkeys(name for _, parts, _ in rows for name in parts))
    axis = linear_axis(0, max(sum(parts.values()) for _, parts, _ in rows), (left, right))
    canvas.x_axis(axis, top, bottom, unit)
    for position, (arm, parts, total) in enumerate(rows):
        y, start = top + ROW * position, 0.0
        with canvas.arm(arm), canvas.link(href):
            canvas.text("name", left + 4, y + 14, arm.label)
            canvas.text("value end", right, y + 14, total)
            for name, value in parts.items():
                x, width = axis(start), axis(start + value) - axis(start)
                title_text = f"{arm.label}, {name}: {short(value)} {unit}"
                canvas.rect(f"part part-{names.index(name)}", x, y + 19, width, 11, title_text)
                start += value
    return canvas.svg()


def spectrum(lines: Sequence[tuple[Arm, list[float], bool]], title: str, rank: int | None = None) -> Markup:
    """Singular values (largest first) against their index, on a log axis; the third item says whether it is dashed."""
    left, right, top, bottom, height = 46, WIDTH - 12, 20, 252, 292
    canvas = Canvas(WIDTH, height, title, "spectrum")
    positive = [value for _, values, _ in lines for value in values if value > 0]
    # Twelve decades below the largest value there is only rounding.
    y_axis = log_axis(max(min(positive), max(positive) * 1e-12), max(positive), (bottom, top))
    x_axis = linear_axis(1, max(len(values) for _, values, _ in lines), (left, right), snug=True)
    canvas.y_axis(y_axis, left, right, "singular value")
    canvas.x_axis(x_axis, top, bottom, "index", ticks_only=True)
    if rank and rank < x_axis.span[1]:
        canvas.line("reference", (x_axis(rank), top), (x_axis(rank), bottom))
        canvas.text("", x_axis(rank) + 4, top + 10, f"r = {rank}")
    for arm, values, dashed in lines:
        points = [(index, value) for index, value in enumerate(values, start=1) if value > 0]
        with canvas.arm(arm):
            canvas.line("line dashed" if dashed else "line", *[(x_axis(x), y_axis(y)) for x, y in points])
            for x, y in thin(points, MAX_HOVER):
                kind = "f(BA)" if dashed else "BA"
                canvas.circle("hover", x_axis(x), y_axis(y), 6, f"{arm.label}, {kind}, value {x}: {short(y)}")
    return canvas.svg()


def plane_paths(paths: Sequence[tuple[Arm, str, list[list[float]]]], title: str, explained: Sequence[float]) -> Markup:
    """Paths through a plane, (step, x, y) along each; a ring where they start and a dot where they end.

    Both axes have the same unit, so that lengths and angles can be read off.
    """
    height, left, right, top, bottom = 360, 46, WIDTH - 12, 20, 318
    canvas = Canvas(WIDTH, height, title, "plane")
    xs = padded([point[1] for *_, path in paths for point in path])
    ys = padded([point[2] for *_, path in paths for point in path])
    unit = max((xs[1] - xs[0]) / (right - left), (ys[1] - ys[0]) / (bottom - top))
    x_middle, y_middle = sum(xs) / 2, sum(ys) / 2
    x_half, y_half = unit * (right - left) / 2, unit * (bottom - top) / 2
    x_axis = linear_axis(x_middle - x_half, x_middle + x_half, (left, right), snug=True)
    y_axis = linear_axis(y_middle - y_half, y_middle + y_half, (bottom, top), snug=True)
    share = [f" ({value:.0%} of the energy)" for value in explained] + ["", ""]
    canvas.y_axis(y_axis, left, right, f"component 2{share[1]}")
    canvas.x_axis(x_axis, top, bottom, f"component 1{share[0]}")
    for arm, seed, path in paths:
        points = [(x_axis(point[1]), y_axis(point[2])) for point in path]
        with canvas.arm(arm):
            canvas.line("line thin", *points)
            for (x, y), point in list(zip(points, path, strict=True))[1:-1]:
                canvas.circle("hover", x, y, 5, f"{arm.label}, seed {seed}, step {point[0]:,.0f}")
            canvas.circle("mark", *points[0], 3.5, f"{arm.label}, seed {seed}: start")
            canvas.circle("dot", *points[-1], 4, f"{arm.label}, seed {seed}: step {path[-1][0]:,.0f}, the end")
    return canvas.svg()
