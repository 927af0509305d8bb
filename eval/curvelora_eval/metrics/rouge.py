"""ROUGE-1, ROUGE-2 and ROUGE-L: n-gram and longest-subsequence overlap, the mean over rows of F1 in [0, 1] (Lin 2004).

https://aclanthology.org/W04-1013; the arithmetic is the rouge_score package's.
"""

from __future__ import annotations

import datasets
import evaluate
import numpy as np
from rouge_score.rouge_scorer import RougeScorer

from curvelora_eval.metrics import KEYS, require_rows


class Rouge(evaluate.Metric):
    """`compute(predictions, references, use_stemmer=False)` with texts (n,) gives rouge1, rouge2 and rougeL.

    `use_stemmer` compares word stems (Porter). Raises ValueError on empty input.
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=__doc__,
            citation="",
            inputs_description="predictions, references: texts (n,)",
            features=datasets.Features({k: datasets.Value("string") for k in ("predictions", "references")}),
        )

    def _compute(self, predictions, references, use_stemmer=False) -> dict:
        require_rows("rouge", predictions)
        rows = self.row_scores(predictions, references, use_stemmer=use_stemmer)
        return {key: float(scores.mean()) for key, scores in rows.items()}

    def row_scores(self, predictions, references, use_stemmer=False) -> dict[str, np.ndarray]:
        """Return each key's F1 of every row, (n,); their mean is the metric, so a bootstrap may resample them."""
        scorer = RougeScorer(KEYS["rouge"], use_stemmer=use_stemmer)
        rows = [scorer.score(target=r, prediction=p) for p, r in zip(predictions, references, strict=True)]
        return {key: np.array([row[key].fmeasure for row in rows]) for key in KEYS["rouge"]}
