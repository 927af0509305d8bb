"""The first screen: five plots that answer what it costs, whether it is stable, and whether it is there.

A panel is a figure of the page: heading, chart, caption, and the files that its numbers come from.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

from markupsafe import Markup

from curvelora_eval.lab.canvas import setting_text, short
from curvelora_eval.lab.charts import Curve, Row, SpikeRow, curves, dot_rows, noise_and_spikes, ratio_bars
from curvelora_eval.lab.folder import Arm, Lab, dig
from curvelora_eval.lab.heatmap import QUANTITIES, colour_bar, heat_map, map_axes
from curvelora_eval.report.load import number
from curvelora_eval.report.svg import Point, smooth

SWEEP_COMMAND = "curvelora sweep --model CHECKPOINT --grid wide --out SWEEP"


@dataclass
class Panel:
    """`views` are (name, chart, legend, note), switched by radio buttons, in the place of `chart`; `keys` are (class, name)
    of parts that have a colour of their own; `missing` says in a sentence why there is no chart."""

    heading: str
    chart: Markup | None = None
    caption: str = ""
    sources: list[tuple[str, str]] = field(default_factory=list)
    missing: str = ""
    kind: str = ""
    views: list[tuple[str, Markup, Markup | None, str]] = field(default_factory=list)
    keys: list[tuple[str, str]] = field(default_factory=list)


def first_screen(lab: Lab) -> list[Panel]:
    """The five panels, in reading order; all five are there, with a sentence where there are no numbers."""
    return [overhead_panel(lab), loss_panel(lab), stability_panel(lab), resolvability_panel(lab), map_panel(lab)]


def overhead_panel(lab: Lab) -> Panel:
    """Step time against the baseline's."""
    name = lab.baseline.label if lab.baseline else "the baseline"
    panel = Panel(f"Step time as a multiple of {name}'s", sources=sources(lab, _cost_file(lab)), kind="overhead")
    rows = []
    for arm in lab.arms:
        record = dig(lab.cost, "arms", arm.key)
        overhead = dig(record, "overhead") or ({"ratio": 1.0} if arm.baseline and record else {})
        ratio = number(overhead.get("ratio"))
        if ratio is None:
            continue
        low, high = number(overhead.get("low")), number(overhead.get("high"))
        bounds = f" [{low:.2f}, {high:.2f}]" if None not in (low, high) else ""
        rows.append(Row(arm, ratio, low, high, f"{ratio:.2f} ×{bounds}", source(lab, _cost_file(lab))))
    if not rows:
        panel.missing = "Cost was not measured in this run."
        return panel
    panel.chart = ratio_bars(rows, panel.heading)
    rounds = number(lab.cost.get("rounds"))
    panel.caption = "Bars start at 1. Whiskers: 95 % interval" + (
        f" over {rounds:,.0f} interleaved rounds." if rounds else "."
    )
    return panel


def loss_panel(lab: Lab) -> Panel:
    panel = Panel("Training loss by step", sources=sources(lab, "results.json"), kind="loss")
    lines = [Curve(arm, seeds, ends=_ends(lab, arm, seeds)) for arm in lab.arms if (seeds := lab.series(arm, "loss"))]
    if not lines:
        panel.missing = "No run has logged a loss."
        return panel
    panel.sources = run_sources(lab, lines[0].arm, "steps.jsonl")
    span = smoothing_span(lines)
    calm = _calm_span(lines, span)
    panel.chart = curves(lines, panel.heading, calm, smoothing=span, y_name="loss (nats)")
    panel.caption = (
        f"Median over seeds of each seed's moving average ({span} steps); bands from the lowest to the highest seed."
    )
    if calm:
        panel.caption += " What lies above is cut off."
    if any(line.ends for line in lines):
        panel.caption += " Cross: a run that diverged."
    return panel


def smoothing_span(lines: Sequence[Curve]) -> int:
    """A twenty-fifth of the longest run, so that what is left of the noise does not hide the order of the arms."""
    return max(1, max(len(points) for line in lines for points in line.seeds.values()) // 25)


def _ends(lab: Lab, arm: Arm, seeds: dict[str, list[Point]]) -> dict[str, Point]:
    return {seed: seeds[seed][-1] for seed in lab.diverged(arm) if seed in seeds}


def _calm_span(lines: Sequence[Curve], span: int) -> Point | None:
    """The range of the seeds that did not diverge, without the first tenth of the run where that would take up most of the
    height: the arms part below it. None where nothing is to be left out."""
    calm = [
        smooth(points, span)
        for line in lines
        for seed, points in line.seeds.items()
        if seed not in line.ends and points
    ]
    if not calm:
        return None
    last = max(points[-1][0] for points in calm)
    everything = [y for points in calm for _, y in points]
    settled = [y for points in calm for x, y in points if x >= last / 10] or everything
    low, high, top = min(everything), max(settled), max(everything)
    if top - low > 1.5 * (high - low):
        top = high
    elif not any(line.ends for line in lines):
        return None
    return low - 0.05 * (top - low), top + 0.1 * (top - low)


def stability_panel(lab: Lab) -> Panel:
    """Noise and spikes share their rows: one arm a row."""
    panel = Panel("Loss noise and spikes", sources=sources(lab, "results.json"), kind="stability")
    rows = []
    for arm in lab.arms:
        if not any(run.get("stability") for run in lab.runs(arm).values()):
            continue
        dots = []
        for key, hollow in (("residual_std", False), ("paired_residual_std", True)):
            found = lab.spread(arm, "stability", key)
            if found and not (arm.baseline and hollow):
                text = f"{'paired ' if hollow else ''}noise {short(found['mean'])}{_bounds(found)}"
                dots.append(Row(arm, found["mean"], found["low"], found["high"], text, hollow=hollow))
        spikes = {
            seed: dig(run, "stability", "spike_steps") or []
            for seed, run in lab.runs(arm).items()
            if dig(run, "stability", "spikes") is not None
        }
        if dots or spikes:
            rows.append(SpikeRow(arm, dots, spikes, source(lab, "results.json")))
    if not rows:
        panel.missing = "The runs are too short to measure noise or spikes."
        return panel
    lasts = (run.get("steps") for arm in lab.arms for run in lab.runs(arm).values())
    steps = number(lab.settings.get("steps")) or max((number(last) or 0 for last in lasts), default=1)
    panel.chart = noise_and_spikes(rows, steps, panel.heading)
    panel.caption = (
        "Filled: standard deviation of the loss around its running median. Hollow: the same of the difference to the "
        f"baseline on the same batches. {lab.bars} One lane a seed."
    )
    return panel


def _bounds(found: dict) -> str:
    return "" if found["low"] is None else f" [{short(found['low'])}, {short(found['high'])}]"


def resolvability_panel(lab: Lab) -> Panel:
    panel = Panel("Resolvability by step", sources=sources(lab, "results.json"), kind="resolvability")
    lines = []
    for arm in lab.arms:
        for part, dashed in (("forward", False), ("derivative", True)):
            seeds = lab.presence_series(arm, part)
            if seeds:
                href = first_file(lab, arm, "presence.jsonl")
                lines.append(Curve(arm, seeds, name=part, dashed=dashed, href=href))
    if not lines:
        panel.missing = "No arm bends the weights' update elementwise, so there is nothing to resolve."
        return panel
    panel.sources = run_sources(lab, lines[0].arm, "presence.jsonl")
    percent = lambda share: f"{100 * share:.3g} %"  # noqa: E731
    panel.chart = curves(lines, panel.heading, (0.0, 1.0), percent, y_name="share of entries")
    panel.caption = (
        "Entries in which the nonlinearity survives rounding. Solid: in the forward pass. Dashed: in its derivative. "
        "At 0 % the arm is LoRA."
    )
    return panel


def map_panel(lab: Lab) -> Panel:
    """The sweep: a map over two axes, rows over one, and otherwise a word about its table."""
    panel = Panel("Amplitude × frequency", kind="sweep wide")
    if lab.sweep is None or not lab.sweep.get("cells"):
        panel.missing = (
            f"There is no sweep yet. `{SWEEP_COMMAND}` makes one, and `curvelora bench report LAB --sweep SWEEP` "
            "shows it here."
        )
        return panel
    folder = lab.sweep_folder or lab.folder
    panel.sources = [("sweep.json", relative(folder / "sweep.json", lab.folder))]
    sweep = with_links(lab.sweep, folder, lab.folder)
    names = map_axes(sweep)
    panel.heading = " × ".join(reversed(names)).capitalize()
    if len(names) != 2:
        return _one_axis(panel, sweep, names)
    panel.views = [
        (quantity.name, heat_map(sweep, quantity), colour_bar(sweep, quantity), quantity.note)
        for quantity in QUANTITIES
        if any(quantity.get(cell) is not None for cell in sweep["cells"])
    ]
    if not panel.views:
        panel.missing = "No cell of the sweep has run yet."
    panel.caption = "Cross: at least one seed diverged. Outlined: the published setting, a = 5e-5 and w = 1e4."
    return panel


def _one_axis(panel: Panel, sweep: dict, names: Sequence[str]) -> Panel:
    if len(names) != 1:
        panel.missing = f"The sweep has {len(names)} axes, more than a map can show; sweep.json lists every cell."
        return panel
    rows, base = [], number(dig(sweep, "baseline", "heldout_loss"))
    for position, value in enumerate(sweep["axes"][names[0]]):
        cells = [cell for cell in sweep["cells"] if dig(cell, "values", names[0]) == value]
        losses = [loss for cell in cells if (loss := number(cell.get("heldout_loss"))) is not None]
        if losses:
            arm = Arm(str(value), f"{names[0]} {setting_text(value)}", position, 1, False, False, {})
            mean = sum(losses) / len(losses)
            rows.append(Row(arm, mean, min(losses), max(losses), f"{mean:.4g}", next(iter(cells)).get("href")))
    if not rows:
        panel.missing = "No cell of the sweep has a held-out loss yet."
        return panel
    marks = [(base, f"baseline {base:.4g}")] if base is not None else []
    panel.chart = dot_rows(rows, f"Held-out loss by {names[0]}", marks=marks, name="held-out loss")
    panel.caption = "Mean over seeds; bars from the lowest to the highest seed."
    return panel


def with_links(sweep: dict, folder: Path, out: Path) -> dict:
    """The sweep with `href` in each cell whose folder is there, relative to `out`."""
    cells = []
    for cell in sweep["cells"]:
        path = folder / str(cell.get("folder"))
        cells.append(cell | {"href": relative(path, out) + "/"} if cell.get("folder") and path.is_dir() else cell)
    return sweep | {"cells": cells}


def relative(path: Path, folder: Path) -> str:
    return quote(Path(os.path.relpath(path.resolve(), folder.resolve())).as_posix())


def source(lab: Lab, name: str) -> str | None:
    """A link to a file of the lab folder; None where it is not there."""
    return quote(name) if (lab.folder / name).is_file() else None


def sources(lab: Lab, *names: str) -> list[tuple[str, str]]:
    return [(name, href) for name in names if (href := source(lab, name))]


def first_file(lab: Lab, arm: Arm, name: str = "steps.jsonl") -> str | None:
    """A link to the file of this name in the folder of the arm's first seed that has it."""
    paths = (f"{run.get('folder')}/{name}" for run in lab.runs(arm).values())
    return next((href for path in paths if (href := source(lab, path))), None)


def run_sources(lab: Lab, arm: Arm, name: str) -> list[tuple[str, str]]:
    """Links to results.json, which lists the runs, and to one run's file of this name; the others lie beside it."""
    href = first_file(lab, arm, name)
    return sources(lab, "results.json") + ([(f"{name} of {arm.label}", href)] if href else [])


def _cost_file(lab: Lab) -> str:
    """cost.json, or results.json where the cost stands in there only."""
    name = str(lab.cost.get("file") or "cost.json")
    return name if (lab.folder / name).is_file() else "results.json"
