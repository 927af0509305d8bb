"""ROUGE-1, ROUGE-2 and ROUGE-L: n-gram and longest-subsequence overlap, the mean over rows of F1 in [0, 1] (Lin 2004).

https://aclanthology.org/W04-1013; the arithmetic is the rouge_score package's.

A row with several references (DialogSum's test rows have three) scores the mean over them, which is what scoring against
each reference in turn and averaging the results gives. `over_references="max"` takes the best one a key instead, as
rouge_score's own `score_multi` does; the two differ by several points, so they never belong in one table. The baseline
in DialogSum's repository (cylnlp/dialogsum, Baseline/README.md) scores against the first reference only: a third number.
"""

from __future__ import annotations

from statistics import fmean

import datasets
import evaluate
import numpy as np
from rouge_score.rouge_scorer import RougeScorer

from curvelora_eval.metrics import KEYS, require_rows

OVER_REFERENCES = {"mean": fmean, "max": max}


class Rouge(evaluate.Metric):
    """`compute(predictions, references, use_stemmer=False, over_references="mean")` gives rouge1, rouge2 and rougeL.

    Predictions are texts (n,); a reference is a text or a list of texts. `use_stemmer` compares word stems (Porter).
    Raises ValueError on empty input, a row without a reference and an unknown `over_references`.
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=__doc__,
            citation="",
            inputs_description="predictions: texts (n,); references: texts or lists of texts (n,)",
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Sequence(datasets.Value("string"))}
            ),
        )

    def add_batch(self, *, predictions=None, references=None, **kwargs) -> None:
        """Store every reference as a list of texts: an arrow column has one type."""
        super().add_batch(predictions=predictions, references=[_texts(r) for r in references], **kwargs)

    def _compute(self, predictions, references, use_stemmer=False, over_references="mean") -> dict:
        require_rows("rouge", predictions)
        rows = self.row_scores(predictions, references, use_stemmer=use_stemmer, over_references=over_references)
        return {key: float(scores.mean()) for key, scores in rows.items()}

    def row_scores(self, predictions, references, use_stemmer=False, over_references="mean") -> dict[str, np.ndarray]:
        """Return each key's F1 of every row, (n,); their mean is the metric, so a bootstrap may resample them."""
        if over_references not in OVER_REFERENCES:
            raise ValueError(f"over_references must be one of {', '.join(OVER_REFERENCES)}, found {over_references!r}")
        scorer = RougeScorer(KEYS["rouge"], use_stemmer=use_stemmer)
        rows = []
        for row, (prediction, reference) in enumerate(zip(predictions, references, strict=True)):
            if not (texts := _texts(reference)):
                raise ValueError(f"rouge needs a reference for every row, and row {row} has none")
            each = [scorer.score(target=text, prediction=prediction) for text in texts]
            rows.append(
                {key: OVER_REFERENCES[over_references]([s[key].fmeasure for s in each]) for key in KEYS["rouge"]}
            )
        return {key: np.array([row[key] for row in rows]) for key in KEYS["rouge"]}


def _texts(reference: str | list[str]) -> list[str]:
    return [reference] if isinstance(reference, str) else list(reference)
