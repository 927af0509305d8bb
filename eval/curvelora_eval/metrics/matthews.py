"""Matthews correlation coefficient, in [-1, 1], for two or more classes (Matthews 1975; Gorodkin 2004)."""

from __future__ import annotations

import datasets
import evaluate
import numpy as np
from sklearn.metrics import matthews_corrcoef

from curvelora_eval.metrics import require_rows


class Matthews(evaluate.Metric):
    """`compute(predictions, references)` with class ids (n,) gives `{"matthews": float}`.

    Where predictions or references are all one class the coefficient is 0 / 0; scikit-learn, and GLUE with it, calls
    that 0, and so does this. Raises ValueError on empty input.
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=__doc__,
            citation="",
            inputs_description="predictions, references: class ids (n,)",
            features=datasets.Features({k: datasets.Value("int64") for k in ("predictions", "references")}),
        )

    def _compute(self, predictions, references) -> dict:
        require_rows("matthews", predictions)
        if len({*predictions, *references}) == 1:
            return {"matthews": 0.0}  # scikit-learn's value too, but it warns about it at every resample
        return {"matthews": float(matthews_corrcoef(references, predictions))}

    def from_confusion(self, matrix: np.ndarray, classes: list[int]) -> dict:
        """The same from counts (references, predictions): (c s - p.t) / sqrt((s^2 - p.p) (s^2 - t.t)), Gorodkin eq. 8."""
        matrix = matrix.astype(float)  # rows^4 overflows int64 at some 80,000 rows
        wanted, given, rows = matrix.sum(1), matrix.sum(0), matrix.sum()
        spread = (rows**2 - given @ given) * (rows**2 - wanted @ wanted)
        covered = np.trace(matrix) * rows - wanted @ given
        return {"matthews": float(covered / np.sqrt(float(spread))) if spread else 0.0}
