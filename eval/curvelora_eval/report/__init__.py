"""A report on run folders: one self-contained HTML page and one Markdown table.

The page needs no network and no script: its charts are inline SVG and its style sheet is part of it.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from urllib.parse import quote

from curvelora_eval.report.load import Run, load_runs
from curvelora_eval.report.svg import Dot, Series, dot_chart, line_chart
from curvelora_eval.report.table import cells, headings, is_share, markdown_table, metric_cell
from curvelora_eval.report.verdict import baseline, caveats, verdict

TITLE = "Fine-tuning runs compared"


def write_report(runs: list[Path], out: Path, title: str | None = None) -> tuple[Path, Path]:
    """Write report.html and report.md into `out`, which is made where missing, and return their paths in that order.

    Raises:
        UserError: a run folder does not exist, has no result.json, or holds a file that cannot be read as JSON; or
            `out` cannot be written.
    """
    from curvelora_eval.files import (  # here, since importing curvelora loads torch and costs seconds
        make_folder,
        write_text,
    )

    loaded = load_runs([Path(run) for run in runs])
    out = make_folder(Path(out))
    html, markdown = out / "report.html", out / "report.md"
    write_text(html, render_page(loaded, out, title or TITLE))
    write_text(markdown, render_markdown(loaded, title or TITLE))
    return html, markdown


def render_markdown(runs: list[Run], title: str) -> str:
    """Return the Markdown file: title, verdict, table, caveats."""
    lists = ["\n".join(f"- {_plain(sentence)}" for sentence in part) for part in (verdict(runs), caveats(runs))]
    blocks = [f"# {_plain(title)}", lists[0], markdown_table(runs), lists[1]]
    return "\n\n".join(block for block in blocks if block) + "\n"


def render_page(runs: list[Run], out: Path, title: str) -> str:
    """Return the HTML page; links to the run folders are relative to `out`."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("curvelora_eval", "report"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("page.html.j2").render(
        title=title,
        verdict=verdict(runs),
        caveats=caveats(runs),
        headings=headings(runs),
        rows=[(_link(run.folder, out), cells(run, runs)) for run in runs],
        loss_chart=_loss_chart(runs),
        resolvability_chart=_shares_chart(runs, "resolvability", ("forward", "derivative"), "Resolvability by step"),
        spline_chart=_shares_chart(
            runs, "spline", ("beyond_grid", "beyond_support"), "Spline inputs beyond the grid by step"
        ),
        score_charts=_score_charts(runs),
        baseline=baseline(runs).label,
        details=[_details(run) for run in runs],
    )


def _loss_chart(runs: list[Run]) -> str | None:
    lines = [
        Series(run.label, run.series("loss"), colour, marks=run.series("eval_loss")) for colour, run in enumerate(runs)
    ]
    lines = [line for line in lines if line.points or line.marks]
    return line_chart(lines, "Loss by step") if lines else None


def _shares_chart(runs: list[Run], kind: str, parts: tuple[str, str], title: str) -> str | None:
    """Two logged shares of every run that has them; the second one is dashed."""
    lines = [
        Series(f"{run.label}, {part.replace('_', ' ')}", run.series(f"{kind}_{part}"), colour, dashed=part == parts[1])
        for colour, run in enumerate(runs)
        for part in parts
    ]
    lines = [line for line in lines if line.points]
    percent = lambda share: f"{100 * share:.3g} %"  # noqa: E731
    return line_chart(lines, title, (0.0, 1.0), percent) if lines else None


def _score_charts(runs: list[Run]) -> list[tuple[str, str]]:
    """Return (metric, chart) for each primary metric: two metrics do not share an axis."""
    charts = []
    for metric in dict.fromkeys(run.primary_metric for run in runs if run.score["value"] is not None):
        share = is_share(metric)
        dots = {
            run.label: Dot(run.label, **run.score, colour=colour, text=metric_cell(run))
            for colour, run in enumerate(runs)
            if run.primary_metric == metric and run.score["value"] is not None
        }
        form = (lambda x: f"{100 * x:.3g} %") if share else (lambda x: f"{x:.4g}")
        limits = (0.0, 1.0) if share else (float("-inf"), float("inf"))
        band = dots.get(baseline(runs).label)
        charts.append((metric, dot_chart(list(dots.values()), f"{metric} by run", form, limits, band)))
    return charts


def _details(run: Run) -> dict:
    """Return what the folded part of the page shows of a run."""
    head = ("schema", "kind", "name")
    result = {key: value for key, value in run.result.items() if key not in head}
    evaluation = {key: value for key, value in (run.evaluation or {}).items() if key not in head}
    # Every metric gets its own line; the table has the primary one only.
    metrics = evaluation.pop("metrics", None)
    evaluation = (metrics if isinstance(metrics, dict) else {}) | evaluation
    return {
        "label": run.label,
        "parts": [
            ("Result", _pairs(result)),
            ("Evaluation", _pairs(evaluation)),
            ("Environment", _pairs(run.environment or {})),
        ],
        "config": run.config,
    }


def _pairs(mapping: dict) -> list[tuple[str, str]]:
    return [(key.replace("_", " "), _as_text(value)) for key, value in mapping.items()]


def _as_text(value: object) -> str:
    if value is None:
        return "–"
    if isinstance(value, dict):
        return ", ".join(f"{key} {_as_text(item)}" for key, item in value.items()) or "–"
    if isinstance(value, int | float) and not isinstance(value, bool):
        return f"{value:,}" if isinstance(value, int) else f"{value:.6g}"
    return value if isinstance(value, str) else json.dumps(value)


def _link(folder: Path, out: Path) -> str:
    return quote(Path(os.path.relpath(folder.resolve(), out.resolve())).as_posix()) + "/"


def _plain(text: str) -> str:
    return " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;")
