"""Pearson's r (linear) and Spearman's rho (of the ranks), each in [-1, 1], for a regression target such as STS-B."""

from __future__ import annotations

import datasets
import evaluate
import numpy as np
from scipy.stats import pearsonr, spearmanr

from curvelora_eval.metrics import require_rows


class PearsonSpearman(evaluate.Metric):
    """`compute(predictions, references)` with numbers (n,) gives `{"pearson": float | None, "spearman": float | None}`.

    Both are None, with a `reason`, where there are fewer than two rows, a number is not finite or a side is constant.
    Raises ValueError on empty input. scipy does the arithmetic.
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=__doc__,
            citation="",
            inputs_description="predictions, references: numbers (n,)",
            features=datasets.Features({k: datasets.Value("float64") for k in ("predictions", "references")}),
        )

    def _compute(self, predictions, references) -> dict:
        require_rows("pearson_spearman", predictions)
        reason = _undefined(np.asarray(predictions, dtype=float), np.asarray(references, dtype=float))
        if reason:
            return {"pearson": None, "spearman": None, "reason": reason}
        return {
            "pearson": float(pearsonr(predictions, references).statistic),
            "spearman": float(spearmanr(predictions, references).statistic),
        }


def _undefined(predictions: np.ndarray, references: np.ndarray) -> str | None:
    """Say why the correlation of two vectors (n,) does not exist, or return None where it does."""
    if len(predictions) < 2:
        return "a correlation needs at least two rows"
    for side, values in (("predictions", predictions), ("references", references)):
        if not np.isfinite(values).all():
            return f"{np.count_nonzero(~np.isfinite(values))} of {len(values)} {side} are not finite"
        if np.ptp(values) == 0:
            return f"the {side} are constant, so the correlation is 0 / 0"
    return None
