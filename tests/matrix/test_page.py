"""docs/matrix.md shows the matrix as it is."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
from page import METHODS, Record, declared_cells, render, row
from refusals import REFUSALS

AGAIN = "write it again: python -m pytest tests/matrix --record-matrix docs/matrix.md"


@pytest.fixture(scope="module")
def page(root: Path) -> str:
    return (root / "docs/matrix.md").read_text(encoding="utf-8")


def test_the_page_has_every_cell_and_no_other(page):
    modules = [importlib.import_module(path.stem) for path in Path(__file__).parent.glob("test_*.py")]
    declared = {text for module in modules for _, text in declared_cells(module)}
    table = page.partition("## Refusals")[0]
    shown = {line.split(" | ")[0].removeprefix("| ") for line in table.splitlines() if line.startswith("| ")}
    assert shown - {"cell", "---"} == declared, AGAIN


def test_the_page_has_every_method_and_every_refusal(page):
    assert row(["cell", *METHODS]) in page, AGAIN
    for refusal in REFUSALS:
        assert f"**{refusal.title}**: {refusal.reason}." in page, AGAIN
    assert "failed" not in page.partition("## Refusals")[0] and "skipped" not in page


def test_a_failure_would_be_shown():
    record = Record(outcomes={("theme", "a cell"): {"lora": ["passed", "failed"], "loran": ["passed"] * 3}})
    environment = {"versions": {}, "commit": "none", "python": "any", "hardware": {"gpu": "a GPU", "cpu": "a CPU"}}
    shown = render(record, environment, "cpu")
    assert row(["a cell", "**failed**", "–", "3", *["–"] * (len(METHODS) - 3)]) in shown
    assert "on a CPU" in shown and "on a GPU" in render(record, environment, "cuda")
