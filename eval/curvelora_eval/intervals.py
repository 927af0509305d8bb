"""Percentile bootstrap over rows: how far a score would move had other rows of the same kind been drawn.

For b = 1..B draw n row indices with replacement and compute the statistic s_b on them; the interval at level c is the
quantiles (1 - c) / 2 and (1 + c) / 2 of s_1..s_B (Efron and Tibshirani, An Introduction to the Bootstrap, 1993,
section 13.3). It covers the choice of rows, not the choice of training seed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from curvelora_eval.metrics import KEYS, load_metric

Interval = dict[str, Any]


def bootstrap_interval(
    statistic: Callable[[np.ndarray], Mapping[str, float | None]],
    n_rows: int,
    level: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Interval]:
    """Return `{key: {"value", "low", "high"}}` for each key that `statistic` gives; the seed decides the numbers.

    Args:
        statistic: maps row indices (n_rows,) to named scores; other things than numbers among them are passed over.
        n_rows: how many rows there are to draw from.
        level: the share of resamples between low and high, in (0, 1).
        resamples: B, how many resamples are drawn.
        seed: of the generator that draws the indices.

    A resample whose score is None or NaN is dropped; `"dropped"`, present only where it is not 0, counts them.

    Raises:
        ValueError: no row, a level outside (0, 1) or no resample.
    """
    if n_rows < 1:
        raise ValueError("a bootstrap interval needs at least one row, found 0")
    if not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1, found {level}; write 0.95 for a 95 % interval")
    if resamples < 1:
        raise ValueError(f"resamples must be at least 1, found {resamples}")

    values = statistic(np.arange(n_rows))
    draws: dict[str, list[float]] = {key: [] for key, value in values.items() if value is None or _is_number(value)}
    rng = np.random.default_rng(seed)
    for _ in range(resamples):
        resampled = statistic(rng.integers(0, n_rows, n_rows))
        for key, kept in draws.items():
            if _is_number(resampled.get(key)) and math.isfinite(resampled[key]):
                kept.append(float(resampled[key]))
    return {key: _interval(values[key], kept, level, resamples) for key, kept in draws.items()}


def score(
    metric_names: Sequence[str],
    predictions: Sequence,
    references: Sequence,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    level: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Interval]:
    """Score rows by each metric, with intervals: `{key: {"value", "low", "high"}}` over the keys of all metrics.

    Args:
        metric_names: names in `curvelora_eval.metrics.METRICS`.
        predictions, references: class ids, numbers or texts, (n,) each.
        options: for each metric name, keyword arguments of its `compute`, such as `{"rouge": {"use_stemmer": True}}`.
        level, resamples, seed: as in `bootstrap_interval`.

    The value comes from the metric's public `compute`. A value that is None has None bounds and a `"reason"`.

    Raises:
        ValueError: an unknown metric, no row, or sides of unequal length.
    """
    result: dict[str, Interval] = {}
    for name in metric_names:
        metric = load_metric(name)
        settings = metric_options(name, predictions, references, (options or {}).get(name, {}))
        point = metric.compute(predictions=predictions, references=references, **settings)
        statistic = resampler(metric, predictions, references, settings)
        intervals = bootstrap_interval(statistic, len(predictions), level, resamples, seed)
        for key in KEYS[name]:
            result[key] = intervals[key] | {"value": point[key]}
            if point[key] is None:
                result[key]["reason"] = point["reason"]
    return result


def metric_options(name: str, predictions: Sequence, references: Sequence, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the metric's keyword arguments, with what must not change from one resample to the next filled in."""
    options = dict(given)
    if name == "f1" and options.get("labels") is None:
        # A resample may miss a class; without this it could turn from macro to binary F1.
        options["labels"] = sorted({*np.asarray(predictions).tolist(), *np.asarray(references).tolist()})
    return options


def resampler(metric: Any, predictions: Sequence, references: Sequence, settings: dict) -> Callable:
    """Return indices (n,) -> scores, by the cheapest way that the metric has: row scores, class counts, or `_compute`
    (the public `compute` would write an arrow table a resample)."""
    if hasattr(metric, "row_scores"):
        rows = metric.row_scores(predictions, references, **settings)
        return lambda index: {key: float(scores[index].mean()) for key, scores in rows.items()}
    given, wanted = np.asarray(predictions), np.asarray(references)
    if hasattr(metric, "from_confusion"):
        classes, codes = np.unique(np.concatenate([wanted, given]), return_inverse=True)
        cells = codes[: len(wanted)] * len(classes) + codes[len(wanted) :]

        def from_counts(index: np.ndarray) -> Mapping[str, float]:
            counts = np.bincount(cells[index], minlength=len(classes) ** 2).reshape(len(classes), -1)
            return metric.from_confusion(counts, classes.tolist(), **settings)

        return from_counts
    return lambda index: metric._compute(given[index], wanted[index], **settings)


def _interval(value: float | None, kept: list[float], level: float, resamples: int) -> Interval:
    defined = value is not None and math.isfinite(value)
    low, high = np.quantile(kept, [(1 - level) / 2, (1 + level) / 2]).tolist() if defined and kept else (None, None)
    interval: Interval = {"value": float(value) if defined else None, "low": low, "high": high}
    if len(kept) < resamples:
        interval["dropped"] = resamples - len(kept)
    return interval


def _is_number(value: object) -> bool:
    return isinstance(value, int | float | np.number) and not isinstance(value, bool)
