"""Numeric accuracy: the share of rows with |prediction - reference| <= tolerance, in [0, 1]; no number is a wrong one.

The rule of LLM-Adapters' arithmetic tasks (arXiv 2304.01933, evaluate.py), with its tolerance of 0.001. As there, the
difference is taken in floating point: 0.001 is within the tolerance of 0, and 5.001 is just outside that of 5.
"""

from __future__ import annotations

from collections.abc import Iterable

import datasets
import evaluate
import numpy as np

from curvelora_eval.metrics import require_rows


class NumericAccuracy(evaluate.Metric):
    """`compute(predictions, references, tolerance=1e-3)` with numbers (n,) gives `{"accuracy": float}`.

    A number may be written as text, with commas between thousands ("1,234.5"). A prediction that is None, not a number
    or not finite is wrong. Raises ValueError on empty input, a reference that is not finite and a negative tolerance.
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=__doc__,
            citation="",
            inputs_description="predictions, references: numbers (n,), or texts of them; a prediction may be None",
            features=datasets.Features({k: datasets.Value("float64") for k in ("predictions", "references")}),
        )

    def add_batch(self, *, predictions=None, references=None, **kwargs) -> None:
        """Store rows as numbers; what is none becomes NaN, which is within no tolerance."""
        super().add_batch(predictions=_numbers(predictions), references=_numbers(references), **kwargs)

    def _compute(self, predictions, references, tolerance=1e-3) -> dict:
        require_rows("numeric_accuracy", predictions)
        return {"accuracy": float(self.row_scores(predictions, references, tolerance)["accuracy"].mean())}

    def row_scores(self, predictions, references, tolerance=1e-3) -> dict[str, np.ndarray]:
        """Return 1.0 or 0.0 for every row, (n,); their mean is the metric, so a bootstrap may resample them."""
        if not tolerance >= 0:
            raise ValueError(f"numeric_accuracy needs a tolerance of at least 0, found {tolerance}")
        wanted, given = np.array(_numbers(references)), np.array(_numbers(predictions))
        if not np.isfinite(wanted).all():
            row = int(np.argmin(np.isfinite(wanted)))
            raise ValueError(
                f"numeric_accuracy needs a finite reference for every row; row {row} has {references[row]!r}"
            )
        return {"accuracy": (np.abs(given - wanted) <= tolerance).astype(float)}


def _numbers(values: Iterable) -> list[float]:
    return [_number(value) for value in values]


def _number(value: object) -> float:
    try:
        return float(value.replace(",", "") if isinstance(value, str) else value)
    except (TypeError, ValueError):  # None, or text that is no number
        return float("nan")
