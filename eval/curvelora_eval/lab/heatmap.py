"""The map of a sweep over two axes: one heat map for each quantity, to be switched by radio buttons in the page."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from curvelora_eval.lab.canvas import Canvas, setting_text, short
from curvelora_eval.lab.folder import dig
from curvelora_eval.report.load import number

# Lightness falls evenly from low to high, so that the order survives colour blindness and grey print.
RAMP = ((243, 240, 226), (190, 219, 200), (118, 181, 187), (66, 129, 168), (44, 77, 130), (27, 33, 80))
PUBLISHED = {"amplitude": 5e-5, "frequency": 1e4}
MOST_TEXT = 14  # columns; with more of them the values do not fit into their cells
WIDTH = 900


@dataclass
class Quantity:
    """One of the map's views. `get` reads a cell of sweep.json; None where the cell has no such number."""

    key: str
    name: str
    get: Callable[[dict], float | None]
    text: Callable[[float], str]
    note: str
    fixed: tuple[float, float] | None = None


def _share(cell: dict) -> float | None:
    return None if cell.get("status") == "missing" else float(is_diverged(cell))


def _variance(cell: dict) -> float | None:
    std = number(cell.get("residual_std"))
    return None if std is None else std**2


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %" if share == 0 or share >= 0.0005 else "< 0.1 %"


QUANTITIES = (
    Quantity(
        "loss",
        "Held-out loss",
        lambda cell: number(cell.get("heldout_loss")),
        lambda v: f"{v:.3f}" if abs(v) < 1000 else short(v),
        "Loss on held-out rows after training, mean over seeds.",
    ),
    Quantity("variance", "Loss variance", _variance, short, "Variance of the training loss around its running median."),
    Quantity("divergence", "Divergence", _share, _percent, "Share of the seeds that diverged.", (0.0, 1.0)),
    Quantity(
        "resolvability",
        "Resolvability",
        lambda cell: number(cell.get("resolvability_forward")),
        _percent,
        "Share of entries in the forward pass that the nonlinearity changes.",
        (0.0, 1.0),
    ),
)


def is_diverged(cell: dict) -> bool:
    return bool(cell.get("diverged")) or cell.get("status") == "diverged"


def map_axes(sweep: dict) -> list[str]:
    """The names of the sweep's axes, amplitude after frequency: the map has the first across and the second upwards."""
    names = list(sweep.get("axes") or {})
    return sorted(names, key=lambda name: name == "amplitude")


def heat_map(sweep: dict, quantity: Quantity) -> Markup:
    """One cell a point of the grid; a cross where a seed diverged, an outline at the published setting.

    The smallest value of the second axis is at the bottom. Colours span the values at which no seed diverged, on a log
    scale where the largest is more than 30 times the smallest.
    """
    across, upwards = map_axes(sweep)
    xs, ys = sweep["axes"][across], list(reversed(sweep["axes"][upwards]))
    left, right, top, height = 74, WIDTH - 6, 6, 40 if len(ys) <= 6 else 30
    width = (right - left) / len(xs)
    bottom = top + height * len(ys)
    canvas = Canvas(WIDTH, bottom + 44, f"{quantity.name} by {across} and {upwards}", "map")
    values = {(x, y): _mean(quantity, _cells(sweep, across, x, upwards, y)) for x in xs for y in ys}
    scale = colour_scale(_calm(sweep, quantity), quantity.fixed)
    for column, x in enumerate(xs):
        for row, y in enumerate(ys):
            cells = _cells(sweep, across, x, upwards, y)
            box = (left + width * column, top + height * row, width, height)
            where = f"{across} {setting_text(x)}, {upwards} {setting_text(y)}"
            _draw_cell(canvas, box, where, values[x, y], cells, quantity, scale, len(xs) <= MOST_TEXT)
    for column, x in enumerate(xs):
        canvas.text("middle", left + width * (column + 0.5), bottom + 17, setting_text(x))
    for row, y in enumerate(ys):
        canvas.text("end", left - 8, top + height * (row + 0.5) + 4, setting_text(y))
        for column, x in enumerate(xs):
            if is_published({across: x, upwards: y}):
                box = (left + width * column + 1.5, top + height * row + 1.5, width - 3, height - 3)
                canvas.rect("published", *box, "the published setting")
    canvas.text("middle", (left + right) / 2, bottom + 36, across)
    canvas.upright("middle", 14, (top + bottom) / 2, upwards)
    return canvas.svg()


def _draw_cell(
    canvas: Canvas,
    box: tuple[float, float, float, float],
    where: str,
    value: float | None,
    cells: Sequence[dict],
    quantity: Quantity,
    scale: Callable[[float], float],
    write: bool,
) -> None:
    x, y, width, height = box
    lost = sum(is_diverged(cell) for cell in cells)
    done = [cell for cell in cells if cell.get("status") != "missing"]
    said = f"{quantity.text(value)}" if value is not None else "not measured" if done else "not run"
    title = f"{where}: {said}" + (f"; {lost} of {len(done)} diverged" if lost else "")
    middle = (x + width / 2, y + height / 2 + 4)
    with canvas.link(_folder(cells)):
        if value is None:
            canvas.rect("cell empty", x, y, width, height, title)
        else:
            share = scale(value)
            canvas.rect("cell", x, y, width, height, title, fill=colour(share))
        dark = value is not None and scale(value) > 0.5
        ink = f"middle {'on-dark' if dark else 'on-light'}" if value is not None else "middle"
        if value is None and not lost:
            canvas.text(ink, *middle, "–")
        elif value is not None and write:
            canvas.text(ink, *middle, quantity.text(value))
    if lost:
        # beside the value where there is one, in the middle where there is none
        cx, cy = (x + width - 11, y + 11) if value is not None else (x + width / 2, y + height / 2)
        paint = "cross on-dark" if dark else "cross on-light" if value is not None else "cross"
        canvas.line(paint, (cx - 4, cy - 4), (cx + 4, cy + 4))
        canvas.line(paint, (cx - 4, cy + 4), (cx + 4, cy - 4))


def colour_bar(sweep: dict, quantity: Quantity) -> Markup | None:
    """The legend of the colours, with the baseline's value marked where it has one; None where nothing was measured."""
    known = _calm(sweep, quantity)
    if not known:
        return None
    scale = colour_scale(known, quantity.fixed)
    low, high = quantity.fixed or (min(known), max(known))
    canvas = Canvas(300, 44, f"Colours of {quantity.name.lower()}", "bar-legend")
    for step in range(60):
        canvas.rect("step", 5 + step * 290 / 60, 18, 290 / 60 + 0.4, 9, fill=colour(step / 59))
    canvas.text("", 5, 41, quantity.text(low))
    canvas.text("end", 295, 41, quantity.text(high))
    base = quantity.get(sweep.get("baseline") or {}) if quantity.fixed is None else None
    if base is not None and low <= base <= high:
        x = 5 + 290 * scale(base)
        canvas.line("origin", (x, 14), (x, 29))
        canvas.text("middle" if 60 < x < 240 else "end" if x > 150 else "", x, 10, f"baseline {quantity.text(base)}")
    elif base is not None:
        canvas.text("middle", 150, 10, f"baseline {quantity.text(base)}, beyond the colours")
    return canvas.svg()


def colour_scale(values: Sequence[float], fixed: tuple[float, float] | None = None) -> Callable[[float], float]:
    """A function from values to 0..1; logarithmic where all are above 0 and span more than a factor of 30."""
    low, high = fixed or (min(values, default=0.0), max(values, default=1.0))
    if high <= low:
        return lambda value: 0.0
    if fixed is None and low > 0 and high / low > 30:
        return lambda value: min(max(math.log(value / low) / math.log(high / low), 0.0), 1.0)
    return lambda value: min(max((value - low) / (high - low), 0.0), 1.0)


def colour(share: float) -> str:
    """The ramp's colour at `share` (0..1), as `#rrggbb`."""
    place = share * (len(RAMP) - 1)
    first = min(int(place), len(RAMP) - 2)
    mixed = (round(a + (b - a) * (place - first)) for a, b in zip(RAMP[first], RAMP[first + 1], strict=True))
    return "#" + "".join(f"{channel:02x}" for channel in mixed)


def is_published(values: dict) -> bool:
    """Whether `values` are Sinter's published amplitude and frequency (methods.md, LoRAN)."""
    return values.keys() == PUBLISHED.keys() and all(
        number(value) is not None and math.isclose(value, PUBLISHED[name], rel_tol=1e-6)
        for name, value in values.items()
    )


def _cells(sweep: dict, across: str, x: object, upwards: str, y: object) -> list[dict]:
    return [
        cell
        for cell in sweep.get("cells", [])
        if dig(cell, "values", across) == x and dig(cell, "values", upwards) == y
    ]


def _mean(quantity: Quantity, cells: Sequence[dict]) -> float | None:
    values = [value for cell in cells if (value := quantity.get(cell)) is not None]
    return sum(values) / len(values) if values else None


def _calm(sweep: dict, quantity: Quantity) -> list[float]:
    """The values of the map's points at which no seed diverged, or all where there are none: a lost run has any loss."""
    across, upwards = map_axes(sweep)
    points = [_cells(sweep, across, x, upwards, y) for x in sweep["axes"][across] for y in sweep["axes"][upwards]]
    for chosen in ([cells for cells in points if not any(map(is_diverged, cells))], points):
        values = [value for cells in chosen if (value := _mean(quantity, cells)) is not None]
        if values:
            return values
    return []


def _folder(cells: Sequence[dict]) -> str | None:
    return next((cell["href"] for cell in cells if cell.get("href")), None)
