"""The picture of a comparison: every primary metric's difference with its interval, around a line at 0.

A plain SVG file with its colours in it, so that browsers, viewers and Markdown pages show the same.
"""

from __future__ import annotations

import re
from typing import Any

from markupsafe import Markup

from curvelora_eval.compare.text import difference_text, verdicts
from curvelora_eval.compare.verdict import NOT_DISTINGUISHABLE
from curvelora_eval.report.svg import WIDTH, Dot, dot_chart
from curvelora_eval.report.table import is_share

GREY, BLUE, ORANGE = 7, 0, 1
COLOURS = {BLUE: "#2b5f93", ORANGE: "#c2571a", GREY: "#6d6f73"}
STYLE = (
    "text { font: 13px system-ui, 'Segoe UI', 'DejaVu Sans', Arial, sans-serif; fill: #62666a; } path { fill: none; } "
    ".title, .name, .value { fill: #1d1f21; } .title, .value { font-weight: 600; } .end { text-anchor: end; } "
    ".middle { text-anchor: middle; } .grid { stroke: #ebebe6; } .axis { stroke: #62666a; } .interval { stroke-width: 2; } "
) + " ".join(f".c{n} .dot {{ fill: {c}; }} .c{n} .interval {{ stroke: {c}; }}" for n, c in COLOURS.items())
HEADING = 34


def forest_plot(result: dict[str, Any]) -> str | None:
    """Return the SVG file's text, one chart a unit; None where no difference is defined.

    The later arm's gain is blue and its loss orange; what is not distinguishable is grey.
    """
    several = len(result["arms"]) > 2
    charts: dict[str, list[Dot]] = {}
    for task, found in verdicts(result):
        if found["difference"] is None or found["low"] is None:
            continue
        first, second = found["arms"]
        scale = 100 if is_share(found["metric"]) else 1
        unit = "points" if is_share(found["metric"]) else found["metric"]
        title = f"difference of the primary metric, {unit}" if several else f"{second} - {first}, {unit}"
        label = f"{second} - {first} {task}" if several else task  # a long name is cut at its end
        values = (found["difference"] * scale, found["low"] * scale, found["high"] * scale)
        charts.setdefault(title, []).append(Dot(label, *values, _colour(found), difference_text(found)))
    if not charts:
        return None
    parts, y = [], 0
    for title, dots in charts.items():
        parts.append(Markup('<text class="title" x="12" y="{}">{}</text>').format(y + 22, title))
        chart, height = _placed(dot_chart(dots, title, lambda x: f"{x:g}", (-1e9, 1e9), zero=True), y + HEADING)
        parts.append(chart)
        y += HEADING + height
    level = f"{100 * result['interval']['level']:g} %"
    notes = (
        f"bars: {level} paired bootstrap interval",
        f"blue: better than A; orange: A is better; grey: {NOT_DISTINGUISHABLE}",
    )
    for note in notes:
        parts.append(Markup('<text x="12" y="{}">{}</text>').format(y + 14, note))
        y += 20
    y -= 12
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{y + 20}" viewBox="0 0 {WIDTH} {y + 20}">'
    return f'{head}<style>{STYLE}</style><rect width="100%" height="100%" fill="#fdfdfb"/>{"".join(parts)}</svg>\n'


def _placed(chart: Markup, y: int) -> tuple[str, int]:
    """Put a chart at height y of the file, with classes in the place of the page's colour variables."""
    text = re.sub(r'style="--c: var\(--run-(\d+)\)"', r'class="c\1"', str(chart))
    height = int(re.search(r'viewBox="0 0 \d+ (\d+)"', text)[1])
    return text.replace("<svg ", f'<svg y="{y}" width="{WIDTH}" height="{height}" ', 1), height


def _colour(found: dict[str, Any]) -> int:
    if found["verdict"] == NOT_DISTINGUISHABLE:
        return GREY
    return BLUE if found["verdict"].startswith(found["arms"][1]) else ORANGE
