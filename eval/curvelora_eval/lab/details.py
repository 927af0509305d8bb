"""What the page shows below the first screen: the parts of cost, stability, presence, spectra and paths."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from curvelora_eval.lab.canvas import short
from curvelora_eval.lab.charts import Curve, Row, curves, dot_rows, plane_paths, positive, spectrum, stacked_bars
from curvelora_eval.lab.folder import Arm, Lab, dig, weighted_mean
from curvelora_eval.lab.panels import Panel, first_file, run_sources, source, sources
from curvelora_eval.lab.presence_verdict import SHORT, presence_class, rounding
from curvelora_eval.lab.tables import Table, approximation_table, cost_table, presence_table, seeds_table, spectra_table
from curvelora_eval.report.load import number

SMALL = (220.0, 150.0)  # size of one of several small charts


@dataclass
class Section:
    """A folded part of the page. `grids` are (heading, caption, [(name, chart)]) of small charts with common arms."""

    heading: str
    panels: list[Panel] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    grids: list[tuple[str, str, list[tuple[str, object]]]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.panels or self.tables or self.grids)


def sections(lab: Lab) -> list[Section]:
    """The parts that have anything to show, in reading order."""
    made = (_cost(lab), _stability(lab), _presence(lab), _spectra(lab), _paths(lab), _seeds(lab))
    return [section for section in made if section]


def _cost(lab: Lab) -> Section:
    section = Section("Cost in detail")
    records = dig(lab.cost, "arms") or {}
    arms = [arm for arm in lab.arms if arm.key in records]
    if not arms:
        return section
    file = sources(lab, str(lab.cost.get("file") or "cost.json")) or sources(lab, "results.json")
    href = file[0][1] if file else None
    steps = {arm: number(dig(records[arm.key], "step_seconds", "median")) for arm in arms}
    unit, factor = ("s", 1.0) if max((step or 0.0 for step in steps.values()), default=0.0) >= 1 else ("ms", 1000.0)
    bars = []
    for arm in arms:
        phases = {name: number(dig(phase, "median")) for name, phase in (records[arm.key].get("phases") or {}).items()}
        parts = {name: factor * value for name, value in phases.items() if value is not None}
        if parts:
            total = sum(parts.values()) if steps[arm] is None else factor * steps[arm]
            bars.append((arm, parts, f"{short(total)} {unit}"))
    if bars:
        chart = stacked_bars(bars, "Where a step's time goes", unit, href)
        names = list(dict.fromkeys(name for _, parts, _ in bars for name in parts))
        caption = "Medians of each phase; on the right the median step."
        keys = [(f"part-{i}", name) for i, name in enumerate(names)]
        section.panels.append(Panel("Where a step's time goes", chart, caption, file, kind="phases", keys=keys))
    known = any(number(records[arm.key].get("mfu")) is not None for arm in arms)
    utilisation = (
        ("Model FLOPs utilisation", "mfu") if known else ("Utilisation of a matrix product's rate", "mfu_of_gemm")
    )
    for heading, key, unit, divide in (
        ("Peak memory", "peak_allocated_bytes", "GB", 1e9),
        (*utilisation, "%", 0.01),
        ("Energy of a step", "joules_per_step", "J", 1.0),
    ):
        rows = [
            Row(arm, value / divide, text=f"{short(value / divide)} {unit}", href=href)
            for arm in arms
            if (value := number(records[arm.key].get(key))) is not None
        ]
        if rows:
            caption = (
                f"Model FLOPs: {lab.cost['flops_formula']}"
                if key.startswith("mfu") and lab.cost.get("flops_formula")
                else ""
            )
            section.panels.append(Panel(heading, dot_rows(rows, heading, name=unit), caption, file))
    section.tables.append(cost_table(lab, arms, href))
    section.notes = _cost_notes(lab)
    return section


def _cost_notes(lab: Lab) -> list[str]:
    notes = []
    cost = lab.cost
    facts = [
        f"{cost['device']}" if cost.get("device") else "",
        f"{cost['processes']:,} process{'es' if cost['processes'] != 1 else ''}"
        if number(cost.get("processes"))
        else "",
        f"{cost['tokens_per_step']:,} tokens a step and process" if number(cost.get("tokens_per_step")) else "",
        f"peak {cost['peak_tflops']:,.0f} TFLOP/s" if number(cost.get("peak_tflops")) else "",
        f"a large matrix product reaches {cost['gemm_tflops']:,.3g} TFLOP/s" if number(cost.get("gemm_tflops")) else "",
    ]
    if any(facts):
        notes.append("; ".join(fact for fact in facts if fact) + ".")
    if cost.get("flops_formula"):
        notes.append(f"MFU = model FLOPs / step time / (processes × peak); model FLOPs = {cost['flops_formula']}.")
    return notes


def _stability(lab: Lab) -> Section:
    section = Section("Stability in detail")
    norms = [
        Curve(arm, seeds, href=first_file(lab, arm))
        for arm in lab.arms
        if (seeds := positive(lab.series(arm, "grad_norm")))
    ]
    if norms:
        chart = curves(norms, "Gradient norm by step", log=True, smoothing=_span(norms), y_name="gradient norm")
        caption = "Global norm before clipping, moving average, median over seeds with the band of all."
        section.panels.append(Panel("Gradient norm", chart, caption, run_sources(lab, norms[0].arm, "steps.jsonl")))
    rows = _seed_rows(lab, ("sharpness", "value"))
    if rows:
        chart = dot_rows(rows, "Sharpness", name="largest eigenvalue of the loss' Hessian")
        caption = f"In the adapter's parameters, at the last step. Compares arms of equal form only. {lab.bars}"
        section.panels.append(Panel("Sharpness", chart, caption, sources(lab, "results.json")))
    rows = _seed_rows(lab, ("heldout", "loss"), lambda loss: short(loss, 4))
    if rows:
        chart = dot_rows(rows, "Held-out loss", name="loss (nats)")
        caption = f"After the last step. {lab.bars}"
        section.panels.append(Panel("Held-out loss", chart, caption, sources(lab, "results.json")))
    for heading, key, caption in (
        ("Gradient norm per module type", "grad_norms", "Norm of the gradients of all modules of a type, log scale."),
        (
            "Update per step per module type",
            "update_ratio",
            "‖change of the parameters‖ / ‖parameters‖ in a step, log scale.",
        ),
    ):
        charts = []
        for kind in lab.module_types:
            lines = [
                Curve(arm, seeds, href=first_file(lab, arm))
                for arm in lab.arms
                if (seeds := positive(lab.series(arm, key, kind)))
            ]
            if lines:
                title = f"{heading}: {kind}"
                charts.append((kind, curves(lines, title, log=True, smoothing=_span(lines), size=SMALL)))
        if charts:
            section.grids.append((heading, caption, charts))
    return section


def _span(lines: Sequence[Curve]) -> int:
    return max(1, max(len(points) for line in lines for points in line.seeds.values()) // 25)


def _seed_rows(lab: Lab, path: Sequence[str], text: Callable[[float], str] = short, hollow: bool = False) -> list[Row]:
    rows = []
    for arm in lab.arms:
        found = lab.spread(arm, *path)
        if found:
            bounds = "" if found["low"] is None else f" [{text(found['low'])}, {text(found['high'])}]"
            said = text(found["mean"]) + bounds
            rows.append(Row(arm, found["mean"], found["low"], found["high"], said, source(lab, "results.json"), hollow))
    return rows


def _presence(lab: Lab) -> Section:
    section = Section("Presence in detail")
    file = sources(lab, "results.json")
    rows = []
    for arm in lab.arms:
        for key, hollow in (("exact", False), ("rounded", True)):
            value = lab.of_arm(arm, "presence", "output_ratio", key)
            if value:
                rows.append(Row(arm, value, text=short(value, 2), href=source(lab, "results.json"), hollow=hollow))
    if rows:
        marks = [(level, f"rounding to {SHORT[dtype]}") for dtype in _dtypes(lab) if (level := rounding(dtype))]
        chart = dot_rows(
            rows, "What f adds to a layer's output", log=True, marks=marks, name="share of the adapter's output"
        )
        caption = (
            "Filled: exact. Hollow: between the tensors that enter the product, which are rounded; few entries that move by "
            "a whole unit count for more than the exact change. Left of its line, f adds less than rounding does."
        )
        section.panels.append(Panel("What f adds to a layer's output", chart, caption, file, kind="ratio"))
    section.panels += _phase_and_slope(lab, file)
    rows = _seed_rows(lab, ("presence", "nonlinear_share"), lambda share: f"{100 * share:.3g} %")
    if rows:
        chart = dot_rows(rows, "What no affine map explains", name="share of the adapter's output")
        section.panels.append(
            Panel(
                "What no affine map explains",
                chart,
                "What is left of the adapter's output after the best affine map of its input, in norm.",
                file,
            )
        )
    for heading, path, caption in (
        ("std of BA per module type", ("std_u",), "Standard deviation of the entries of BA, by step, log scale."),
        ("Forward resolvability per module type", ("forward",), "Share of entries by step, 0 to 100 %."),
    ):
        charts = _per_type(lab, path, share=path == ("forward",))
        if charts:
            section.grids.append((heading, caption, charts))
    section.tables += presence_table(lab)
    return section


def _phase_and_slope(lab: Lab, file: list[tuple[str, str]]) -> Iterator[Panel]:
    phases, slopes = [], []
    for arm in lab.arms:
        if presence_class(lab, arm) in (None, "linear"):
            continue
        low, middle, high = (lab.of_arm(arm, "presence", "phase", key) for key in ("p05", "p50", "p95"))
        if middle:
            low = low if low and low > 0 else None
            phases.append(
                Row(
                    arm,
                    middle,
                    low,
                    high,
                    f"{short(middle, 2)} [{short(low, 2)}, {short(high, 2)}]",
                    source(lab, "results.json"),
                )
            )
        rms = lab.of_arm(arm, "presence", "slope_rms")
        if rms:
            slopes.append(Row(arm, rms, text=short(rms, 2), href=source(lab, "results.json")))
    if phases:
        heading = "How far into the sine BA reaches"
        marks = [(math.pi, "half a period")]
        chart = dot_rows(phases, heading, log=True, marks=marks, name="|ω BA| in radians")
        caption = (
            "Median, and the range from the 5 % to the 95 % quantile over entries. (|BA| where f has no frequency.)"
        )
        yield Panel(heading, chart, caption, file)
    if slopes:
        heading = "How far the derivative leaves the linear one"
        yield Panel(
            heading, dot_rows(slopes, heading, log=True, name="rms of f′ / f′(0) − 1"), "Exact, over all entries.", file
        )


def _dtypes(lab: Lab) -> list[str]:
    return list(dict.fromkeys(arm.record.get("dtype") for arm in lab.arms if arm.record.get("dtype") in SHORT))


def _per_type(lab: Lab, path: Sequence[str], share: bool) -> list[tuple[str, object]]:
    """One small chart a module type from presence.jsonl."""
    charts = []
    for kind in dict.fromkeys(kind for arm in lab.arms for kind in _presence_types(lab, arm)):
        lines = []
        for arm in lab.arms:
            seeds = {}
            for seed in lab.runs(arm):
                points = list(_type_points(lab.lines(arm, seed, "presence.jsonl"), kind, path))
                points = points if share else [(x, y) for x, y in points if y > 0]
                if points:
                    seeds[seed] = points
            if seeds:
                lines.append(Curve(arm, seeds, href=first_file(lab, arm, "presence.jsonl")))
        if lines:
            percent = (lambda y: f"{100 * y:.3g} %") if share else None
            span = (0.0, 1.0) if share else None
            charts.append((kind, curves(lines, f"{kind} by step", span, percent, log=not share, size=SMALL)))
    return charts


def _presence_types(lab: Lab, arm: Arm) -> list[str]:
    names = {}
    for seed in lab.runs(arm):
        for line in lab.lines(arm, seed, "presence.jsonl")[-1:]:
            names |= dict.fromkeys(layer.rpartition(".")[2] for layer in line.get("layers") or {})
    return list(names)


def _type_points(lines: list[dict], kind: str, path: Sequence[str]) -> Iterator[tuple[float, float]]:
    for line in lines:
        layers = [record for name, record in (line.get("layers") or {}).items() if name.rpartition(".")[2] == kind]
        value = weighted_mean(layers, *path)
        if value is not None:
            yield line["step"], value


def _spectra(lab: Lab) -> Section:
    section = Section("Spectra of the update")
    chosen = _first_layer(lab)
    if chosen:
        lines, rank = [], number(lab.settings.get("rank"))
        for arm in lab.arms:
            for part, dashed in (("BA", True), ("update", False)):
                values = _median_values(lab, arm, chosen, part)
                if any(value > 0 for value in values):
                    lines.append((arm, values, dashed))
        if lines:
            heading = f"Singular values, {chosen.removeprefix('model.')}"
            chart = spectrum(lines, heading, int(rank) if rank else None)
            caption = "Relative to the largest. Solid: the whole update. Dashed: the product BA. Median over seeds."
            section.panels.append(Panel(heading, chart, caption, sources(lab, "results.json"), kind="spectrum"))
    for heading, key in (("Effective rank", "effective_rank"), ("Energy beyond rank r", "energy_beyond_rank")):
        rows = []
        for arm in lab.arms:
            values = [value for kind in _spectral_types(lab, arm) for value in lab.values(arm, *kind, "update", key)]
            values = [value for value in values if value > 0]
            if values:
                low, middle, high = min(values), statistics.median(values), max(values)
                rows.append(Row(arm, middle, low, high, short(middle), source(lab, "results.json")))
        if rows:
            chart = dot_rows(rows, heading, log=key == "energy_beyond_rank", name=heading.lower())
            caption = "Median over module types and seeds, with the smallest and the largest."
            section.panels.append(Panel(heading, chart, caption, sources(lab, "results.json")))
    section.tables += spectra_table(lab)
    return section


def _spectral_types(lab: Lab, arm: Arm) -> list[tuple[str, ...]]:
    types = {kind for run in lab.runs(arm).values() for kind in dig(run, "spectra", "types") or {}}
    return [("spectra", "types", kind) for kind in sorted(types)]


def _first_layer(lab: Lab) -> str | None:
    for arm in lab.arms:
        for run in lab.runs(arm).values():
            if layers := dig(run, "spectra", "layers"):
                return next(iter(layers))
    return None


def _median_values(lab: Lab, arm: Arm, layer: str, part: str) -> list[float]:
    found = [dig(run, "spectra", "layers", layer, part, "singular_values") for run in lab.runs(arm).values()]
    found = [values for values in found if values]
    return [statistics.median(column) for column in zip(*found, strict=False)]


def _paths(lab: Lab) -> Section:
    section = Section("Path of the update")
    runs = dig(lab.results, "paths", "runs") or {}
    paths = [(arm, seed, path) for arm in lab.arms for seed, path in (runs.get(arm.key) or {}).items() if len(path) > 1]
    if paths:
        chart = plane_paths(
            paths, "Path of the update in its two main directions", dig(lab.results, "paths", "explained") or []
        )
        caption = "Ring: the start, at the base model. Dot: the end. One path a run, in axes common to all."
        section.panels.append(Panel("Path of the update", chart, caption, sources(lab, "results.json"), kind="path"))
    section.tables += approximation_table(lab)
    if section.tables:
        section.heading += ", and what each form can express"
    return section


def _seeds(lab: Lab) -> Section:
    return Section("Every run", tables=seeds_table(lab))
