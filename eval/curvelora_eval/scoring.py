"""From prediction records to metrics with intervals: what `curvelora eval` reports and `curvelora compare` recomputes.

A record is a line of predictions.jsonl. A `Score` names a metric and the two fields of a record that it compares, so a
task can be scored in several ways, and its result can be recomputed from its own files.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from curvelora_eval.intervals import Interval, bootstrap_interval, metric_options, resampler, score
from curvelora_eval.metrics import KEYS, RIGHT_OR_WRONG, load_metric

PERPLEXITY = "perplexity"
FEWEST_ROWS = 6
"""Rows below which there is no interval and no verdict. Were all rows to speak for one side, chance would still do that with
probability 2^(1 - n) (a sign test): 0.063 of five rows, 0.031 of six. A bootstrap of so few draws the same rows again and
again, and is far too sure of itself."""
Statistic = Callable[[np.ndarray], Mapping[str, float | None]]


@dataclass(frozen=True)
class Score:
    """One metric applied to two fields of prediction records.

    A record whose prediction is None (no answer found, or a prompt over the model's limit) stays in the score and counts
    against it: it is wrong, or an empty text, or a class of its own; a correlation is then undefined, and says so.
    """

    metric: str
    """A name in `curvelora_eval.metrics.METRICS`, or "perplexity", which reads the fields `nll` (nats, summed over the
    record) and `tokens` instead of the two below."""
    prediction: str = "prediction"
    reference: str = "reference"
    options: Mapping[str, Any] = field(default_factory=dict)
    """Keyword arguments of the metric's `compute`."""
    keys: Mapping[str, str] = field(default_factory=dict)
    """Key of the metric -> key in the result, such as `{"accuracy": "acc_norm"}`; the others keep their own."""

    @property
    def fields(self) -> tuple[str, str]:
        """The two fields of a record that the metric reads."""
        return ("nll", "tokens") if self.metric == PERPLEXITY else (self.prediction, self.reference)

    @property
    def results(self) -> dict[str, str]:
        """Key of the metric -> key in the result, for all of the metric's keys."""
        own = (PERPLEXITY,) if self.metric == PERPLEXITY else KEYS[self.metric]
        return {key: self.keys.get(key, key) for key in own}

    @property
    def right_or_wrong(self) -> bool:
        """Whether a row scores 1 or 0 and nothing between."""
        return self.metric in RIGHT_OR_WRONG


def score_records(
    records: Sequence[Mapping[str, Any]],
    scores: Sequence[Score],
    level: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Interval]:
    """Return `{key: {"value", "low", "high"[, "reason"]}}`, the first score's keys first: the primary metric leads.

    Below `FEWEST_ROWS` records low and high are None, and the reason says so.

    Args:
        records: prediction records, a row each.
        scores: what to compute; the first is the primary one.
        level, resamples, seed: of the percentile bootstrap over records, as in `bootstrap_interval`.

    Raises:
        ValueError: no record, a record without a field that a score reads, an unknown metric, or two scores with the same
            key in the result.
    """
    found: dict[str, Interval] = {}
    for each in scores:
        if each.metric == PERPLEXITY:
            result = bootstrap_interval(statistic(records, each), len(records), level, resamples, seed)
            for interval in result.values():
                if interval["value"] is None:
                    interval["reason"] = _no_perplexity(*columns(records, each))
        else:
            given, wanted = columns(records, each)
            result = score([each.metric], given, wanted, {each.metric: each.options}, level, resamples, seed)
            result = {each.results[key]: interval for key, interval in result.items()}
        if twice := sorted(set(result) & set(found)):
            raise ValueError(f"two scores give {twice[0]!r}; name one of them otherwise with `keys`")
        found |= result
    if len(records) < FEWEST_ROWS:
        return {key: _without_interval(interval, len(records)) for key, interval in found.items()}
    return found


def statistic(records: Sequence[Mapping[str, Any]], score: Score) -> Statistic:
    """Return a function of row indices (n,) that scores those rows: `{key in the result: value}`.

    It is what a bootstrap calls a thousand times: rows are scored, or classes counted, once and here.

    Raises:
        ValueError: as in `score_records`.
    """
    given, wanted = columns(records, score)
    if score.metric == PERPLEXITY:
        # A loss that was not finite is None in a file; here it is NaN, and so is what it is added to.
        losses, tokens, (key,) = np.array(given, dtype=float), np.array(wanted), score.results.values()
        return lambda rows: {key: perplexity(losses[rows].tolist(), tokens[rows].tolist())}
    options = metric_options(score.metric, given, wanted, score.options)
    of_rows = resampler(load_metric(score.metric), given, wanted, options)
    names = score.results

    def scored(rows: np.ndarray) -> Mapping[str, float | None]:
        values = of_rows(rows)
        return {name: values[key] for key, name in names.items()}

    return scored


def columns(records: Sequence[Mapping[str, Any]], score: Score) -> tuple[list, list]:
    """Return the predictions and the references (n,) that a score compares, with None filled in as `Score` says."""
    sides = []
    for name in score.fields:
        missing = next((row for row, record in enumerate(records) if name not in record), None)
        if missing is not None:
            raise ValueError(f"{score.metric} reads {name!r}, which record {missing} does not have")
        sides.append([record[name] for record in records])
    given, wanted = sides
    nothing = _NOTHING.get(score.metric)
    return [nothing if value is None else value for value in given], wanted


def _without_interval(interval: Interval, n: int) -> Interval:
    why = f"no interval, since {n} {'row is' if n == 1 else 'rows are'} fewer than {FEWEST_ROWS}"
    return {"value": interval["value"], "low": None, "high": None, "reason": interval.get("reason", why)}


def _no_perplexity(losses: Sequence[float | None], tokens: Sequence[int]) -> str:
    lost = sum(loss is None or not math.isfinite(loss) for loss in losses)
    if lost:
        return f"{lost} of {len(losses)} records have no finite loss"
    return f"it is exp({sum(losses) / max(1, sum(tokens)):.0f}), beyond the largest number"


def perplexity(losses: Sequence[float], tokens: Sequence[int]) -> float:
    """exp of the mean negative log-likelihood a token (infinite where that overflows)."""
    try:
        return math.exp(sum(losses) / max(1, sum(tokens)))
    except OverflowError:
        return math.inf


# What stands for a prediction that is not there, in the type that the metric compares. -1 is no class of any task.
_NOTHING: dict[str, Any] = {
    "accuracy": -1,
    "exact_match": "",
    "f1": -1,
    "matthews": -1,
    "pearson_spearman": math.nan,
    "rouge": "",
}
