"""Accuracy: the share of rows whose predicted class is the reference class, in [0, 1]."""

from __future__ import annotations

import datasets
import evaluate
import numpy as np
from sklearn.metrics import accuracy_score

from curvelora_eval.metrics import require_rows


class Accuracy(evaluate.Metric):
    """`compute(predictions, references)` with class ids (n,) gives `{"accuracy": float}`; scikit-learn does the count.

    Raises ValueError on empty input.
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=__doc__,
            citation="",
            inputs_description="predictions, references: class ids (n,)",
            features=datasets.Features({k: datasets.Value("int64") for k in ("predictions", "references")}),
        )

    def _compute(self, predictions, references) -> dict:
        require_rows("accuracy", predictions)
        return {"accuracy": float(accuracy_score(references, predictions))}

    def row_scores(self, predictions, references) -> dict[str, np.ndarray]:
        """Return 1.0 or 0.0 for every row, (n,); their mean is the metric, so a bootstrap may resample them."""
        return {"accuracy": (np.asarray(predictions) == np.asarray(references)).astype(float)}
