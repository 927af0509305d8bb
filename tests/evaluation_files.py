"""Evaluation folders as `curvelora eval` writes them, from predictions made up in a test."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from curvelora_eval.scoring import Score, score_records


def write_evaluation(
    folder: Path, records: Sequence[dict[str, Any]], scores: Sequence[Score], task: str = "boolq", **changes: Any
) -> Path:
    """Write evaluation.json and predictions.jsonl of `records`; `changes` replace fields of the result."""
    folder.mkdir(parents=True, exist_ok=True)
    protocol = {"name": "llm-adapters", "version": 1, "template": "legacy", "hash": "0" * 64, "quirks": []}
    metrics = score_records(records, scores, resamples=20)
    result = {
        "schema": 1,
        "kind": "evaluation",
        "task": task,
        "metrics": metrics,
        "primary_metric": next(iter(metrics)),
        "scoring": [dataclasses.asdict(score) for score in scores],
        "benchmark": {"split": "test", "rows": len(records), "published": len(records), "subset": None, "version": 1},
        "protocol": protocol | changes.pop("protocol", {}),
        "counts": {"rows": len(records)},
        "dataset": {"path": "rows.json", "split": "test", "sha256": "1" * 64, "rows": len(records)},
        "model": {"path": "base", "dtype": "float32", "quantization": "none"},
        "adapter": {"path": "adapter", "sha256": "2" * 64},
    }
    (folder / "evaluation.json").write_text(json.dumps(result | changes), encoding="utf-8")
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (folder / "predictions.jsonl").write_text(lines, encoding="utf-8")
    return folder


def labelled(right: Sequence[bool] | np.ndarray, start: int = 0) -> list[dict[str, Any]]:
    """Records of a two-label task that are right where `right` says so; every fifth wrong one found no answer."""
    records = []
    for row, hit in enumerate(right, start):
        wanted = ("true", "false")[row % 2]
        wrong = None if row % 5 == 0 else ("false", "true")[row % 2]
        records.append({"row": row, "id": f"boolq-{row}", "prediction": wanted if hit else wrong, "reference": wanted})
    return records
