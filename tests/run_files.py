"""Read what a run left behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl about training; `start` has the one before it."""
    return [record for record in _records(folder) if record["step"] > 0]


def start(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl of step 0: what the adapter changes before training; there should be one."""
    return [record for record in _records(folder) if record["step"] == 0]


def _records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def result(folder: Path, name: str = "result.json") -> dict[str, Any]:
    """One of the JSON files of a run."""
    return json.loads((folder / name).read_text(encoding="utf-8"))
