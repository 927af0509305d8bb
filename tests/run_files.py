"""Read what a run left behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def result(folder: Path, name: str = "result.json") -> dict[str, Any]:
    """One of the JSON files of a run."""
    return json.loads((folder / name).read_text(encoding="utf-8"))
