"""The table: one row a run. The same cells make the Markdown table and the page's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from curvelora_eval.report import published
from curvelora_eval.report.load import Run, number
from curvelora_eval.wording import percent

DASH = "–"

# Metrics in [0, 1] that read best as a percentage; all others are shown with three decimals.
SHARES = ("accuracy", "accuracy_norm", "f1", "exact_match", "rouge1", "rouge2", "rougeL", "precision", "recall")


def is_share(metric: str | None) -> bool:
    """Whether `metric` lies in [0, 1] and is shown as a percentage: a name in `SHARES`, or one that ends with it."""
    return metric is not None and (metric in SHARES or metric.endswith(tuple(f"_{name}" for name in SHARES)))


def headings(runs: list[Run]) -> list[str]:
    """Return the column headings; the metric's names the metric where all runs share it."""
    metrics = {run.primary_metric for run in runs} - {None}
    metric = metrics.pop() if len(metrics) == 1 else "primary metric"
    level = interval_level(runs)
    return [
        "arm",
        "method",
        "trainable parameters",
        *(["published parameters"] if published.has_counts(runs) else []),
        "step time, median (ms)",
        "examples/s",
        "peak memory (MB)",
        f"{metric} on unseen rows" + (f" [{level} interval]" if level else ""),
        *(["published score"] if published.has_scores(runs) else []),
        "loss, first → last",
        "resolvability, forward / derivative",
        *(heading for heading, _ in optional_columns(runs)),
    ]


def optional_columns(runs: list[Run]) -> list[tuple[str, Callable[[Run], str]]]:
    """Return (heading, cell) of the columns in which at least one run has something to show."""
    columns = []
    if any(number(_get(run.result, "start_shift", "relative")) for run in runs):
        columns.append(("outputs moved before training", _start))
    if any(run.merged_score["value"] is not None for run in runs):
        columns.append(("after merging [outputs moved]", _merged))
    return columns


def _start(run: Run) -> str:
    return show(_get(run.result, "start_shift", "relative"), lambda share: "0" if share == 0 else percent(share))


def _merged(run: Run) -> str:
    if run.merged_score["value"] is None:
        return DASH
    gap = show(_get(run.result, "merge_gap", "relative"), percent)
    return f"{score_text(run.merged_score, run.primary_metric)} [{gap}]"


def cells(run: Run, runs: list[Run]) -> list[str]:
    """Return the text of a run's cells, in the order of `headings(runs)`; a dash stands for what was not measured."""
    result = run.result
    return [
        run.label,
        str(result.get("method") or DASH),
        show(result.get("trainable_parameters"), lambda n: f"{n:,.0f}"),
        *([published.count_cell(run)] if published.has_counts(runs) else []),
        show(_get(result, "step_seconds", "median"), lambda seconds: _significant(seconds * 1e3)),
        show(result.get("examples_per_second"), _significant),
        show(result.get("peak_memory_bytes"), lambda size: f"{size / 1e6:,.0f}"),
        metric_cell(run),
        *([published.score_cell(run, score_text)] if published.has_scores(runs) else []),
        _pair(result.get("first_loss"), result.get("last_loss"), " → ", lambda loss: f"{loss:.3f}"),
        _pair(_get(result, "resolvability", "forward"), _get(result, "resolvability", "derivative"), " / ", percent),
        *(cell(run) for _, cell in optional_columns(runs)),
    ]


def metric_cell(run: Run) -> str:
    """Return `82.6 % [79.2, 85.9]` for a share, `12.345 [11.900, 12.800]` for a loss, or a dash."""
    value, low, high = run.score.values()
    if value is None:
        return DASH
    text = score_text(run.score, run.primary_metric)
    if low is None or high is None:
        return text
    scale, decimals, _ = _units(run.primary_metric)
    return f"{text} [{low * scale:.{decimals}f}, {high * scale:.{decimals}f}]"


def score_text(score: dict[str, float | None], metric: str | None) -> str:
    """Return `82.6 %` for a share, `12.345` for a loss."""
    scale, decimals, unit = _units(metric)
    return f"{score['value'] * scale:.{decimals}f}{unit}"


def _units(metric: str | None) -> tuple[int, int, str]:
    return (100, 1, " %") if is_share(metric) else (1, 3, "")


def show(value: object, form: Callable[[float], str]) -> str:
    """Return `form(value)` for a finite number and a dash for anything else."""
    return DASH if number(value) is None else form(value)


def interval_level(runs: list[Run]) -> str | None:
    """Return the confidence level of the runs' intervals, such as `95 %`; None where they state none or differ."""
    levels = {number(_get(run.evaluation, "interval", "level")) for run in runs} - {None}
    return f"{100 * levels.pop():g} %" if len(levels) == 1 else None


def markdown_table(runs: list[Run]) -> str:
    """Return the GitHub-flavoured Markdown table, without a final newline."""
    heads = headings(runs)
    rule = ["---"] * 2 + ["---:"] * (len(heads) - 2)
    return "\n".join(_markdown_row(row) for row in [heads, rule, *(cells(run, runs) for run in runs)])


def _markdown_row(row: list[str]) -> str:
    return "| " + " | ".join(markdown_escape(cell) for cell in row) + " |"


def markdown_escape(text: str) -> str:
    text = " ".join(text.split()).replace("&", "&amp;").replace("\\", "\\\\").replace("|", "\\|")
    # "< 0.1 %" is harmless; a "<" before a letter or slash would open an HTML tag.
    return "".join("&lt;" if c == "<" and text[i + 1 : i + 2] != " " else c for i, c in enumerate(text))


def _pair(first: object, second: object, between: str, form: Callable[[float], str]) -> str:
    if number(first) is None and number(second) is None:
        return DASH
    return show(first, form) + between + show(second, form)


def _significant(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _get(mapping: Any, *keys: str) -> Any:
    for key in keys:
        mapping = mapping.get(key) if isinstance(mapping, dict) else None
    return mapping
