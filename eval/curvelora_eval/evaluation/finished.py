"""Results that are in --out already: whose they are, and under which labels."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

RESULT = "evaluation.json"
# what makes two results those of one model, among everything that decides predictions
IDENTITY = ("model", "dtype", "quantization", "double_quantization", "adapter")

Results = dict[str, dict[str, Any]]
"""Name of the task's folder -> evaluation.json."""


def read_results(out: Path) -> dict[str, Results]:
    """Label -> results, for everything finished below `out`."""
    found: dict[str, Results] = {}
    for path in sorted(out.glob(f"*/*/{RESULT}")):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(record, dict) and "benchmark" in record:
            found.setdefault(path.parent.parent.name, {})[path.parent.name] = record
    return found


def identity(decided_by: Mapping[str, Any]) -> dict[str, Any]:
    """Which model answered: the base's content, how it is stored, and the adapter's content."""
    return {name: decided_by.get(name) for name in IDENTITY}


def by_model(results: Results) -> list[Results]:
    """The results of one label, apart by the model that answered."""
    found: dict[str, Results] = {}
    for name, record in results.items():
        found.setdefault(json.dumps(identity(record.get("decided_by", {}))), {})[name] = record
    return list(found.values())


def labels_of(results: Mapping[str, Results], content: list[str | None]) -> list[str]:
    """The labels under which an adapter with these hashes has results."""
    return [
        label
        for label, records in results.items()
        if any(record.get("decided_by", {}).get("adapter") == content for record in records.values())
    ]
