"""Exact match: the share of rows whose text equals the reference text, in [0, 1]."""

from __future__ import annotations

import datasets
import evaluate
import numpy as np

from curvelora_eval.metrics import require_rows


class ExactMatch(evaluate.Metric):
    """`compute(predictions, references, normalise_whitespace=False)` with texts (n,) gives `{"exact_match": float}`.

    `normalise_whitespace` strips both ends and makes each inner run of whitespace one space; case and punctuation
    always count. Raises ValueError on empty input.
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=__doc__,
            citation="",
            inputs_description="predictions, references: texts (n,)",
            features=datasets.Features({k: datasets.Value("string") for k in ("predictions", "references")}),
        )

    def _compute(self, predictions, references, normalise_whitespace=False) -> dict:
        require_rows("exact_match", predictions)
        rows = self.row_scores(predictions, references, normalise_whitespace=normalise_whitespace)
        return {key: float(scores.mean()) for key, scores in rows.items()}

    def row_scores(self, predictions, references, normalise_whitespace=False) -> dict[str, np.ndarray]:
        """Return 1.0 or 0.0 for every row, (n,); their mean is the metric, so a bootstrap may resample them."""
        clean = (lambda text: " ".join(text.split())) if normalise_whitespace else (lambda text: text)
        same = [clean(p) == clean(r) for p, r in zip(predictions, references, strict=True)]
        return {"exact_match": np.array(same, dtype=float)}
