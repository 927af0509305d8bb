"""summary.json and summary.md over evaluations as they stand on disk; no models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from curvelora_eval.evaluation.summary import GROUPS, write_summary


def write(folder: Path, task: str, value: float, quirks: tuple[str, ...] = (), **metric: Any) -> None:
    """One evaluation.json with what the summary reads."""
    name = "perplexity" if task == "wikitext2" else "accuracy"
    record = {
        "task": task,
        "primary_metric": name,
        "metrics": {name: {"value": value, "low": value - 0.1, "high": value + 0.1} | metric},
        "counts": {"rows": 10},
        "benchmark": {"subset": None, "limit": None},
        "protocol": {"name": "llm-adapters", "template": "legacy", "hash": "0" * 64, "quirks": list(quirks)},
        "rows_per_second": 1.0,
        "batch_independence": None,
        "repaired": [],
    }
    folder.mkdir(parents=True)
    (folder / "evaluation.json").write_text(json.dumps(record), encoding="utf-8")


def test_a_value_without_interval_has_none_in_the_table(tmp_path: Path) -> None:
    write(tmp_path / "baseline/wikitext2", "wikitext2", 12.5, low=None, high=None, reason="no interval, since 1 row")
    write_summary(tmp_path)
    page = (tmp_path / "summary.md").read_text(encoding="utf-8")
    assert "| baseline | 12.50 |" in page and "baseline, wikitext2: no interval, since 1 row." in page


def test_a_mean_with_quirks_does_not_take_the_place_of_the_clean_one(tmp_path: Path) -> None:
    ways: dict[tuple[str, ...], float] = {(): 0.5, ("pad-0",): 0.25, ("pad-0", "adapter-dropout"): 0.75}
    for quirks, value in ways.items():
        for task in GROUPS["arithmetic"]:
            write(tmp_path / "lora" / "-".join([task, *quirks]), task, value, quirks)
    found = write_summary(tmp_path)["averages"]["lora"]
    assert {name: mean["value"] for name, mean in found.items()} == {
        "arithmetic, llm-adapters (legacy)": 0.5,
        "arithmetic, llm-adapters (legacy) with pad-0": 0.25,
        "arithmetic, llm-adapters (legacy) with pad-0, adapter-dropout": 0.75,
    }
    page = (tmp_path / "summary.md").read_text(encoding="utf-8")
    assert "mean of arithmetic, llm-adapters (legacy) with pad-0 |" in page
