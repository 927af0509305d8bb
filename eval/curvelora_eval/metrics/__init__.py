"""The metrics, kept in the repository so that they need no hub: one small `evaluate` module a metric.

A value that the data leave undefined (the correlation of constant predictions, say) is None, and the result then has
one further key, `reason`, which says why; no metric returns NaN, which JSON cannot hold.

Importing this package is cheap: `evaluate`, scikit-learn, scipy and rouge_score load with the first `load_metric`.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Sized
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import evaluate

# The class in each module is the metric's name in CamelCase.
METRICS: dict[str, str] = {
    "accuracy": "curvelora_eval.metrics.accuracy",
    "exact_match": "curvelora_eval.metrics.exact_match",
    "f1": "curvelora_eval.metrics.f1",
    "label_accuracy": "curvelora_eval.metrics.label_accuracy",
    "matthews": "curvelora_eval.metrics.matthews",
    "numeric_accuracy": "curvelora_eval.metrics.numeric_accuracy",
    "pearson_spearman": "curvelora_eval.metrics.pearson_spearman",
    "rouge": "curvelora_eval.metrics.rouge",
}

KEYS: dict[str, tuple[str, ...]] = {
    "accuracy": ("accuracy",),
    "exact_match": ("exact_match",),
    "f1": ("f1",),
    "label_accuracy": ("accuracy",),
    "matthews": ("matthews",),
    "numeric_accuracy": ("accuracy",),
    "pearson_spearman": ("pearson", "spearman"),
    "rouge": ("rouge1", "rouge2", "rougeL"),
}
# Metrics that call every row right (1) or wrong (0): what McNemar's test is about.
RIGHT_OR_WRONG = ("accuracy", "exact_match", "label_accuracy", "numeric_accuracy")


def load_metric(name: str) -> evaluate.Metric:
    """Return a fresh instance of the metric `name`, one of `METRICS`; it works offline and writes no arrow file.

    Raises:
        ValueError: `name` is unknown; the message has the nearest known name and the list.
    """
    if name not in METRICS:
        near = difflib.get_close_matches(str(name), METRICS, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"unknown metric {name!r}; {hint}known metrics: {', '.join(METRICS)}")
    metric_class = getattr(importlib.import_module(METRICS[name]), name.title().replace("_", ""))
    return metric_class(keep_in_memory=True)


def require_rows(metric: str, predictions: Sized) -> None:
    """Raise ValueError where there is no row to score; `evaluate` itself lets empty input through."""
    if len(predictions) == 0:
        raise ValueError(f"{metric} needs at least one row, but predictions and references are empty")
