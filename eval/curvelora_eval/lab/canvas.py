"""A small SVG canvas: axes that are linear or logarithmic, and shapes whose colours are left to CSS (page.css.j2).

Lengths are in units of the viewBox, about one CSS pixel. Every mark takes a title, which browsers show on hover and
screen readers read.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from markupsafe import Markup

from curvelora_eval.lab.folder import Arm
from curvelora_eval.report.svg import Point, ticks

MINUS = "\u2212"
SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass
class Axis:
    """Maps values in `span` to lengths in `target`; values beyond the span are held at its ends.

    `log` needs a span above 0; `marks` are the ticks, all within the span.
    """

    span: Point
    target: Point
    marks: list[float]
    log: bool = False

    def __call__(self, value: float) -> float:
        return self.free(min(max(value, self.span[0]), self.span[1]))

    def free(self, value: float) -> float:
        """The same, but values beyond the span lie beyond its ends; a log axis needs a value above 0."""
        low, high = self.span
        share = math.log(value / low) / math.log(high / low) if self.log else (value - low) / (high - low)
        return self.target[0] + share * (self.target[1] - self.target[0])

    def label(self, value: float) -> str:
        """The tick label: with as many decimals as the ticks need, or as a power of ten."""
        if self.log:
            return power_text(value)
        step = self.marks[1] - self.marks[0] if len(self.marks) > 1 else abs(value) or 1.0
        if max(abs(mark) for mark in self.marks) < 1e-3 or max(abs(mark) for mark in self.marks) >= 1e6:
            return short(value)
        decimals = max(0, -math.floor(math.log10(step) + 1e-9))
        return f"{value:,.{decimals}f}".replace("-", MINUS)


def linear_axis(low: float, high: float, target: Point, about: int = 5, snug: bool = False) -> Axis:
    """An axis over round numbers that enclose [low, high]; `snug` ends it at low and high themselves."""
    marks = ticks(low, high, about)
    if snug and high > low:
        inside = [mark for mark in marks if low - 1e-12 <= mark <= high + 1e-12]
        return Axis((low, high), target, inside or [low, high])
    return Axis((marks[0], marks[-1]), target, marks)


def log_axis(low: float, high: float, target: Point, most: int = 6) -> Axis:
    """A log axis that encloses [low, high] (both above 0), with at most about `most` ticks: powers of ten, or 1, 2, 5, 10, ...
    where there are few of them."""
    if high / low < 50:
        steps = [
            m * 10.0**p
            for p in range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1)
            for m in (1, 2, 5)
        ]
        first = max(mark for mark in steps if mark <= low * (1 + 1e-9))
        last = min(mark for mark in steps if mark >= high * (1 - 1e-9) and mark > first)
        return Axis((first, last), target, [mark for mark in steps if first <= mark <= last], log=True)
    first, last = math.floor(math.log10(low) + 1e-9), math.ceil(math.log10(high) - 1e-9)
    stride = math.ceil((last - first) / most)
    return Axis((10.0**first, 10.0**last), target, [10.0**power for power in range(first, last + 1, stride)], log=True)


class Canvas:
    """Collects shapes; `svg()` returns them as one accessible image."""

    def __init__(self, width: float, height: float, title: str, kind: str = ""):
        self.width, self.height, self.title, self.kind = width, height, title, kind
        self._parts: list[Markup] = []

    def svg(self) -> Markup:
        head = Markup('<svg class="{}" role="img" aria-label="{}" viewBox="0 0 {:g} {:g}">')
        head = head.format(f"chart {self.kind}".strip(), self.title, self.width, self.height)
        return Markup("").join([head, *self._parts, Markup("</svg>")])

    @contextmanager
    def arm(self, arm: Arm) -> Iterator[None]:
        """Shapes drawn within carry the arm's colour and follow its switch in the legend."""
        with self.group(arm_class(arm)):
            yield

    @contextmanager
    def group(self, kind: str) -> Iterator[None]:
        self._parts.append(Markup('<g class="{}">').format(kind))
        yield
        self._parts.append(Markup("</g>"))

    @contextmanager
    def window(self, left: float, top: float, right: float, bottom: float) -> Iterator[None]:
        """Shapes drawn within are cut off at its edges."""
        box = f"{left:.1f} {top:.1f} {right - left:.1f} {bottom - top:.1f}"
        head = Markup('<svg class="window" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}" viewBox="{}">')
        self._parts.append(head.format(left, top, right - left, bottom - top, box))
        yield
        self._parts.append(Markup("</svg>"))

    @contextmanager
    def link(self, href: str | None) -> Iterator[None]:
        """Shapes drawn within lead to `href`, out of the keyboard's order because the caption has the link too."""
        if href:
            self._parts.append(Markup('<a href="{}" tabindex="-1">').format(href))
        yield
        if href:
            self._parts.append(Markup("</a>"))

    def line(self, kind: str, *points: Point) -> None:
        self._parts.append(Markup('<path class="{}" d="{}"/>').format(kind, _outline(points)))

    def area(self, kind: str, upper: Sequence[Point], lower: Sequence[Point]) -> None:
        """The area between two lines of equal x."""
        d = _outline([*upper, *reversed(lower)]) + "Z"
        self._parts.append(Markup('<path class="{}" d="{}"/>').format(kind, d))

    def text(self, kind: str, x: float, y: float, text: str) -> None:
        self._parts.append(Markup('<text class="{}" x="{:.1f}" y="{:.1f}">{}</text>').format(kind, x, y, text))

    def upright(self, kind: str, x: float, y: float, text: str) -> None:
        """Text that reads upwards."""
        turned = Markup('<text class="{}" transform="translate({:.1f} {:.1f}) rotate(-90)">{}</text>')
        self._parts.append(turned.format(kind, x, y, text))

    def circle(self, kind: str, x: float, y: float, radius: float, title: str) -> None:
        circle = Markup('<circle class="{}" cx="{:.1f}" cy="{:.1f}" r="{:g}"><title>{}</title></circle>')
        self._parts.append(circle.format(kind, x, y, radius, title))

    def rect(self, kind: str, x: float, y: float, width: float, height: float, title: str = "", fill: str = "") -> None:
        shape = Markup('<rect class="{}" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}"{}>{}</rect>')
        paint = Markup(' fill="{}"').format(fill) if fill else ""
        inside = Markup("<title>{}</title>").format(title) if title else ""
        self._parts.append(shape.format(kind, x, y, width, height, paint, inside))

    def x_axis(self, axis: Axis, top: float, bottom: float, name: str = "", ticks_only: bool = False) -> None:
        """Grid lines from `top` to `bottom`, tick labels below, and the axis' name below those."""
        for mark in axis.marks:
            if not ticks_only:
                self.line("grid", (axis(mark), top), (axis(mark), bottom))
            self.line("tick-mark", (axis(mark), bottom), (axis(mark), bottom + 4))
            self.text("middle", axis(mark), bottom + 17, axis.label(mark))
        self.line("axis", (axis.target[0], bottom), (axis.target[1], bottom))
        if name:
            self.text("middle", sum(axis.target) / 2, bottom + 33, name)

    def y_axis(self, axis: Axis, left: float, right: float, name: str = "") -> None:
        """Grid lines from `left` to `right` with labels on their left; the name stands above the axis."""
        for mark in axis.marks:
            self.line("grid", (left, axis(mark)), (right, axis(mark)))
            self.text("end", left - 7, axis(mark) + 4, axis.label(mark))
        if name:
            self.text("", 0, 11, name)


def arm_class(arm: Arm) -> str:
    return f"arm arm-{arm.position} hue-{arm.hue}{' control' if arm.control else ''}"


def short(value: float | None, digits: int = 3) -> str:
    """A number for people: `0.0123`, `12,345`, `3.5e-5`; a dash for None."""
    if value is None:
        return "–"
    if value == 0:
        return "0"
    if 1e-3 <= abs(value) < 1e6:
        decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
        text = f"{abs(value):,.{decimals}f}"
    else:
        mantissa, exponent = f"{abs(value):.{digits - 1}e}".split("e")
        mantissa = mantissa.rstrip("0").rstrip(".") if "." in mantissa else mantissa
        text = f"{mantissa}e{int(exponent)}"
    return MINUS + text if value < 0 else text


def setting_text(value: object) -> str:
    """A setting as it would be typed: `0.002`, `5e-5`, `10,000`; anything else than a number as it is."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if value == 0 or 1e-3 <= abs(value) < 1e6:
        return f"{value:,.10g}"
    mantissa, exponent = f"{value:.10e}".split("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"


def power_text(value: float) -> str:
    """`10⁻³` for a power of ten outside 0.001 to 1000, and plain digits otherwise."""
    power = math.log10(value)
    if 0.00099 < value < 1001 or abs(power - round(power)) > 1e-6:
        return setting_text(float(f"{value:.3g}"))
    return "10" + str(round(power)).translate(SUPERSCRIPT)


def padded(values: Sequence[float], share: float = 0.05) -> Point:
    """The range of the values with a margin of `share` of it on either side."""
    low, high = min(values), max(values)
    margin = share * (high - low) or abs(low) * 0.05 or 0.05
    return low - margin, high + margin


def thin(points: Sequence, most: int) -> list:
    """At most about `most` of the points, evenly spaced, the last one among them."""
    stride = math.ceil(len(points) / most)
    kept = list(itertools.islice(points, 0, None, max(stride, 1)))
    return kept if not points or kept[-1] is points[-1] else [*kept, points[-1]]


def _outline(points: Sequence[Point]) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points) if points else ""
