"""Score one model on labelled rows: metrics with intervals, and everything needed to trust or repeat them."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Mapping
from typing import Any

from datasets import Dataset
from torch import nn

from curvelora.errors import UserError
from curvelora_eval.scoring import PERPLEXITY, Score, score_records
from curvelora_eval.tasks import Predictions, Task

LEVEL, RESAMPLES, INTERVAL_SEED = 0.95, 1000, 0


def evaluate_rows(
    model: nn.Module, task: Task, rows: Dataset, processor: Any, batch_size: int = 32
) -> tuple[dict, Predictions]:
    """Predict and score `rows`; returns (result, predictions), the result as in `docs/results_format.md`.

    Raises:
        UserError: rows that do not fit the task, or an unknown metric.
    """
    task.check(rows, "evaluation rows")
    started = time.perf_counter()
    predicted = task.predict(model, rows, processor, batch_size)
    seconds = time.perf_counter() - started
    metrics = score_predictions(task, predicted)
    result = {
        "schema": 1,
        "kind": "evaluation",
        "task": task.spec.kind,
        "metrics": metrics,
        "primary_metric": next(iter(metrics)),
        "scoring": [dataclasses.asdict(each) for each in scores_of(task)],
        "interval": {
            "method": "percentile bootstrap over rows",
            "level": LEVEL,
            "resamples": RESAMPLES,
            "seed": INTERVAL_SEED,
        },
        "counts": predicted.counts,
        "decoding": "greedy, do_sample=False" if task.spec.kind in ("causal_lm", "seq2seq") else None,
        "seconds": seconds,
        "rows_per_second": len(rows) / seconds,
        "batch_size": batch_size,
    }
    return result, predicted


def score_predictions(task: Task, predicted: Predictions) -> dict[str, Mapping[str, Any]]:
    """Metric key -> {value, low, high}, primary metric first.

    Raises:
        UserError: an unknown metric.
    """
    pairs = zip(predicted.predictions, predicted.references, strict=True)
    names = ("nll", "tokens") if PERPLEXITY in task.metrics else ("prediction", "reference")
    records = [dict(zip(names, pair, strict=True)) for pair in pairs]
    try:
        return score_records(records, scores_of(task), LEVEL, RESAMPLES, INTERVAL_SEED)
    except ValueError as error:
        raise UserError(str(error)) from error


def scores_of(task: Task) -> list[Score]:
    """The scores that the task's metrics stand for, primary first."""
    labels = task.spec.labels
    options = {"f1": {"labels": list(range(len(labels)))}} if labels else {}
    return [Score(name, options=options.get(name, {})) for name in task.metrics]


def prediction_lines(predictions: list[Any], references: list[Any]) -> str:
    """JSON lines, a row each: row, prediction, reference."""
    rows = zip(predictions, references, strict=True)
    return "".join(json.dumps({"row": i, "prediction": p, "reference": r}) + "\n" for i, (p, r) in enumerate(rows))


def describe_interval(value: Mapping[str, Any]) -> str:
    """`0.8260 [0.7920, 0.8590]`, or why there is no value."""
    if value["value"] is None:
        return f"undefined ({value.get('reason', 'no reason given')})"
    if value["low"] is None:
        return f"{value['value']:.4f}" + (f" ({value['reason']})" if value.get("reason") else "")
    return f"{value['value']:.4f} [{value['low']:.4f}, {value['high']:.4f}]"
