"""F1 = 2 TP / (2 TP + FP + FN), in [0, 1].

Binary, the F1 of class 1, when the declared labels are exactly {0, 1}; otherwise macro, the plain mean of the classes'
F1. Without `labels`, the labels that occur in the predictions or the references count as declared. A declared class
that occurs in neither has no F1 (0 / 0) and is left out of the macro mean; in the binary case the value is then None.
"""

from __future__ import annotations

import datasets
import evaluate
import numpy as np
from sklearn.metrics import f1_score

from curvelora_eval.metrics import require_rows


class F1(evaluate.Metric):
    """`compute(predictions, references, labels=None)` with class ids (n,) gives `{"f1": float | None}`.

    Raises ValueError on empty input. scikit-learn does the arithmetic.
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=__doc__,
            citation="",
            inputs_description="predictions, references: class ids (n,); labels: every class id of the task, or None",
            features=datasets.Features({k: datasets.Value("int64") for k in ("predictions", "references")}),
        )

    def _compute(self, predictions, references, labels=None) -> dict:
        require_rows("f1", predictions)
        declared = sorted({*predictions, *references} if labels is None else set(labels))
        # The mean over class 1 alone is binary F1, and takes a prediction of no class (-1) as a plain miss.
        counted = [1] if declared == [0, 1] else declared
        f1 = f1_score(references, predictions, labels=counted, average="macro", zero_division=np.nan)
        if np.isnan(f1):
            return {"f1": None, "reason": "no positive row among predictions and references, so F1 is 0 / 0"}
        return {"f1": float(f1)}

    def from_confusion(self, matrix: np.ndarray, classes: list[int], labels=None) -> dict:
        """The same from counts (references, predictions) of `classes`: what a bootstrap needs a thousand times."""
        declared = classes if labels is None else sorted(set(labels))
        true, either = np.diag(matrix), matrix.sum(0) + matrix.sum(1)
        with np.errstate(invalid="ignore"):
            scores = 2 * true / either
        if declared == [0, 1]:
            return {"f1": float(scores[classes.index(1)]) if 1 in classes else float("nan")}
        scores = scores[[i for i, c in enumerate(classes) if c in declared and either[i] > 0]]
        return {"f1": float(scores.mean()) if len(scores) else float("nan")}
