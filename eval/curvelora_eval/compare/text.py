"""A comparison in words and tables: for the terminal (at most 100 columns) and as Markdown."""

from __future__ import annotations

import textwrap
from typing import Any

from curvelora_eval.compare.build import MACRO
from curvelora_eval.compare.verdict import p_text
from curvelora_eval.report.table import DASH, is_share, markdown_escape

WIDTH = 100
Row = list[str]


def terminal(result: dict[str, Any]) -> str:
    """Return the comparison for a terminal: the arms, a table a pair of arms, and what a reader must know."""
    lines = [_fit(f"{arm['letter']}  {_arm(arm)}") for arm in result["arms"]]
    for first, other in _pairs(result):
        heads, blocks = _heads(first, other, result), _blocks(result, other)
        rows = [row for _, metrics in blocks for row, _, _ in metrics]
        widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
        lines += ["", "  " + _line(heads, widths)]
        for title, metrics in blocks:
            lines.append(_fit(title))
            for row, table, because in metrics:
                lines.append("  " + _line(row, widths))
                lines += _wrap(table, "      ") + _wrap(because, "      ")
    lines.append("")
    for sentence in _sentences(result):
        lines += _wrap(sentence, "")
    return "\n".join(line.rstrip() for line in lines)


def markdown(result: dict[str, Any], picture: bool = True) -> str:
    """Return compare.md, which shows compare.svg where there is a `picture`."""
    title = (
        " against ".join(arm["letter"] for arm in reversed(result["arms"]))
        if len(result["arms"]) == 2
        else "all against A"
    )
    lines = [f"# Comparison: {title}", ""]
    lines += [f"* {arm['letter']}: `{_arm(arm)}`" for arm in result["arms"]]
    for first, other in _pairs(result):
        heads = ["task", *_heads(first, other, result)]
        lines += ["", f"## {other} against {first}", "", _markdown_row(heads), _markdown_row(["---"] * len(heads))]
        tables, becauses = [], []
        for title, metrics in _blocks(result, other):
            for row, table, because in metrics:
                lines.append(_markdown_row([title, *row]))
                name = f"{title.split(',')[0]}, {row[0].removesuffix(', %')}"
                tables += [f"* {name}: {table}."] if table else []
                becauses += [f"* {name}: {because}."] if because else []
        lines += ["", *tables, *becauses] if tables or becauses else []
    lines += ["", "![differences with intervals](compare.svg)"] if picture else []
    lines.append("")
    lines += [f"* {sentence}" for sentence in _sentences(result)]
    return "\n".join([*lines, "", result["rule"], ""])


def verdicts(result: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Return (task, comparison) of every primary metric, and of the macro average where there is one."""
    found = [(task["task"], m) for task in result["tasks"] for m in task["metrics"] if m["primary"]]
    found += [(MACRO, result["macro"])] if result["macro"] else []
    return [(name, each) for name, metric in found for each in metric["comparisons"]]


def difference_text(found: dict[str, Any]) -> str:
    """Return `+1.7 [+0.3, +3.1]`: points of a share, or the metric's own unit."""
    scale, decimals = _scale(found["metric"])
    parts = [_signed(found[key], scale, decimals) for key in ("difference", "low", "high")]
    return parts[0] if DASH in parts else f"{parts[0]} [{parts[1]}, {parts[2]}]"


def _pairs(result: dict[str, Any]) -> list[tuple[str, str]]:
    letters = [arm["letter"] for arm in result["arms"]]
    return [(letters[0], other) for other in letters[1:]]


def _heads(first: str, other: str, result: dict[str, Any]) -> Row:
    level = f"{100 * result['interval']['level']:g} %"
    corrected = max(_tests(result)) > 1
    return ["metric", first, other, f"{other} - {first} [{level}]", "p, Holm" if corrected else "p", "verdict"]


def _blocks(result: dict[str, Any], other: str) -> list[tuple[str, list[tuple[Row, str, str]]]]:
    """(title, its metrics) for each task and the macro average; a metric is (cells, table of right and wrong, because)."""
    blocks = [(_title(task), [_cells(metric, other) for metric in task["metrics"]]) for task in result["tasks"]]
    if macro := result["macro"]:
        blocks.append((f"{MACRO} of {macro['tasks']} tasks", [_cells(macro, other)]))
    return blocks


def _cells(metric: dict[str, Any], other: str) -> tuple[Row, str, str]:
    found = next(each for each in metric["comparisons"] if each["arms"][1] == other)
    first = found["arms"][0]
    unit = ", %" if is_share(metric["metric"]) else ""
    row = [
        f"{metric['metric']}{unit}",
        _score(metric, first),
        _score(metric, other),
        difference_text(found),
        p_text(found["p_corrected"]),
        found["verdict"],
    ]
    table = found["mcnemar"]
    words = (
        f"rows that both get right {table['both_right']:,}, only {first} {table['only_a']:,}, only {other} {table['only_b']:,}, "
        f"neither {table['both_wrong']:,}"
        if table
        else ""
    )
    return row, words, found["because"] or ""


def _score(metric: dict[str, Any], letter: str) -> str:
    (scale, decimals), arm = _scale(metric["metric"]), metric["arms"][letter]
    if arm["value"] is None:
        return DASH
    spread = "" if arm["sd"] is None else f" ± {arm['sd'] * scale:.{decimals}f}"
    return f"{arm['value'] * scale:.{decimals}f}{spread}"


def _scale(metric: str) -> tuple[int, int]:
    return (100, 1) if is_share(metric) else (1, 3)


def _signed(value: float | None, scale: int, decimals: int) -> str:
    if value is None:
        return DASH
    return f"{value * scale:+.{decimals}f}" if value else f"{0:.{decimals}f}"


def _title(task: dict[str, Any]) -> str:
    protocol = " ".join(str(part) for part in (task["protocol"], task["template"]) if part)
    quirks = f"quirks {' '.join(task['quirks'])}" if task["quirks"] else ""
    size = task["subset"] or f"{task['rows']:,} rows"
    windows = f"{task['windows']:,} windows" if task["windows"] else ""
    return ", ".join(part for part in (task["task"], protocol, quirks, task["split"], size, windows) if part)


def _arm(arm: dict[str, Any]) -> str:
    return arm["name"] + (f"  ({len(arm['runs'])} seeds)" if len(arm["runs"]) > 1 else "")


def _sentences(result: dict[str, Any]) -> list[str]:
    """What a reader must know beside the tables."""
    found = list(result["notes"])
    if any(len(arm["runs"]) > 1 for arm in result["arms"]):
        found.append("± is the standard deviation over runs.")
    primary, others = _tests(result)
    if others:
        found.append("The first metric of a task is its primary one.")
    if max(primary, others) > 1:
        which = f"{primary} of primary metrics" + (f", {others} of the others among themselves" if others else "")
        found.append(f"The p-values are corrected for the number of tests (Holm): {which}. The intervals are not.")
    return found


def _tests(result: dict[str, Any]) -> tuple[int, int]:
    """How many tests there are of primary metrics, and of all others."""
    metrics = [metric for task in result["tasks"] for metric in task["metrics"]]
    counts = {metric["primary"]: each["tests"] for metric in metrics for each in metric["comparisons"]}
    return counts.get(True, 0), counts.get(False, 0)


def _line(cells: Row, widths: list[int]) -> str:
    left = (0, len(cells) - 1)
    return "  ".join(
        f"{c:<{w}}" if i in left else f"{c:>{w}}" for i, (c, w) in enumerate(zip(cells, widths, strict=True))
    )


def _wrap(sentence: str, indent: str) -> list[str]:
    return textwrap.wrap(sentence, WIDTH, initial_indent=indent, subsequent_indent=indent + "  " * bool(not indent))


def _fit(text: str) -> str:
    return text if len(text) <= WIDTH else f"{text[:30]}…{text[-(WIDTH - 31) :]}"


def _markdown_row(cells: Row) -> str:
    return "| " + " | ".join(markdown_escape(cell) for cell in cells) + " |"
