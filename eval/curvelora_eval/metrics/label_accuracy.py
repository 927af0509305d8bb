"""Label accuracy: the share of rows whose predicted label is the reference label, in [0, 1]; no label is a wrong one.

What a generative protocol extracts from text is a label ("true", "answer3"), or nothing where no label was found.
"""

from __future__ import annotations

from collections.abc import Iterable

import datasets
import evaluate
import numpy as np

from curvelora_eval.metrics import require_rows


class LabelAccuracy(evaluate.Metric):
    """`compute(predictions, references)` with labels (n,), texts or whole numbers, gives `{"accuracy": float}`.

    A prediction that is None or empty is wrong. Labels are compared letter by letter: case counts. Raises ValueError on
    empty input and on a reference without a label.
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=__doc__,
            citation="",
            inputs_description="predictions, references: labels (n,); a prediction may be None",
            features=datasets.Features({k: datasets.Value("string") for k in ("predictions", "references")}),
        )

    def add_batch(self, *, predictions=None, references=None, **kwargs) -> None:
        """Store rows as texts, which is all that an arrow column takes; no label becomes the empty text."""
        super().add_batch(predictions=_texts(predictions), references=_texts(references), **kwargs)

    def _compute(self, predictions, references) -> dict:
        require_rows("label_accuracy", predictions)
        return {"accuracy": float(self.row_scores(predictions, references)["accuracy"].mean())}

    def row_scores(self, predictions, references) -> dict[str, np.ndarray]:
        """Return 1.0 or 0.0 for every row, (n,); their mean is the metric, so a bootstrap may resample them."""
        wanted = _texts(references)
        if "" in wanted:
            raise ValueError(f"label_accuracy needs a reference for every row, and row {wanted.index('')} has none")
        same = [p == r for p, r in zip(_texts(predictions), wanted, strict=True)]
        return {"accuracy": np.array(same, dtype=float)}


def _texts(labels: Iterable) -> list[str]:
    return ["" if label is None else str(label) for label in labels]
