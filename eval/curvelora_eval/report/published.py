"""What a paper prints for a run, beside what was measured: cells for the table and sentences below it."""

from __future__ import annotations

from typing import Any

from curvelora_eval.report.load import Run, number

DASH = "–"


def has_scores(runs: list[Run]) -> bool:
    """Whether some run has a published score."""
    return any(_scores(run) for run in runs)


def has_counts(runs: list[Run]) -> bool:
    """Whether some run has a published number of parameters."""
    return any(_count(run) for run in runs)


def _scores(run: Run) -> dict[str, float]:
    found = run.published.get("metrics")
    pairs = found.items() if isinstance(found, dict) else ()
    return {str(name): value for name, value in pairs if number(value) is not None}


def _count(run: Run) -> str | None:
    printed = run.published.get("parameters")
    return printed if isinstance(printed, str) and printed else None


def score_cell(run: Run, form: Any) -> str:
    """The published value of the run's primary metric, else all published ones with their names, else a dash.

    Args:
        form: `score_text` of the table.
    """
    scores = _scores(run)
    if run.primary_metric in scores:
        return form({"value": scores[run.primary_metric]}, run.primary_metric)
    return "; ".join(f"{name} {form({'value': value}, name)}" for name, value in scores.items()) or DASH


def count_cell(run: Run) -> str:
    """`3.5M (ours 3,539,264)`: as printed, with the adapter's own count, heads left out as papers do; or a dash."""
    printed, ours = _count(run), number(run.result.get("adapter_parameters"))
    if printed is None:
        return DASH
    return printed if ours is None else f"{printed} (ours {ours:,.0f})"


def sources(runs: list[Run]) -> list[str]:
    """Where the published values are from, and what the recipes say of them; once where runs share it."""
    sentences: dict[str, list[str]] = {}
    for run in runs:
        if source := run.published.get("source"):
            sentences.setdefault(f"published values are those of {source}.", []).append(run.label)
        notes = run.published.get("notes")
        for note in notes if isinstance(notes, list) else ():
            sentences.setdefault(f"{str(note).rstrip('.')}.", []).append(run.label)
    return [f"{', '.join(labels)}: {sentence}" for sentence, labels in sentences.items()]
