"""Score one model on labelled rows: metrics with intervals, and everything needed to trust or repeat them."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import numpy as np
from datasets import Dataset
from torch import nn

from curvelora.errors import UserError
from curvelora_eval.intervals import bootstrap_interval, score
from curvelora_eval.tasks import Predictions, Task
from curvelora_eval.tasks.generation import perplexity

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
    scored: dict[str, Mapping[str, Any]] = {}
    for name in task.metrics:
        if name == "perplexity":
            losses, tokens = np.array(predicted.predictions), np.array(predicted.references)
            scored |= bootstrap_interval(
                lambda rows, a=losses, b=tokens: {"perplexity": perplexity(a[rows].tolist(), b[rows].tolist())},
                len(losses),
                LEVEL,
                RESAMPLES,
                INTERVAL_SEED,
            )
            continue
        options = {"f1": {"labels": list(range(len(task.spec.labels)))}} if name == "f1" and task.spec.labels else None
        try:
            scored |= score(
                [name], predicted.predictions, predicted.references, options, LEVEL, RESAMPLES, INTERVAL_SEED
            )
        except ValueError as error:
            raise UserError(str(error)) from error
    return scored
