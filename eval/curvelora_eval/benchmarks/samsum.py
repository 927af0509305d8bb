"""SAMSum: messenger dialogues and their summaries (Gliwa et al. 2019, arXiv 1911.12237)."""

from __future__ import annotations

from pathlib import Path

from curvelora_eval.benchmarks import summaries
from curvelora_eval.benchmarks.base import Benchmark, Row, Split


def read(path: Path, split: str) -> list[Row]:
    """A JSON list of id, dialogue, summary."""
    return [summaries.make_row(name, record) for name, record in summaries.read(path, "id")]


BENCHMARK = Benchmark(
    name="samsum",
    kind="summarisation",
    title="SAMSum, messenger dialogues",
    source="arXiv 1911.12237 (CC BY-NC-ND 4.0: non-commercial, no derivatives)",
    splits={
        "train": Split(("samsum/train.json",), 14732, hub="train"),
        "validation": Split(("samsum/val.json", "samsum/validation.json"), 818, hub="validation"),
        "test": Split(("samsum/test.json",), 819, hub="test"),
    },
    default_split="test",
    read=read,
    hub=("knkarthick/samsum", None),
    from_hub=lambda row, name: summaries.make_row(row["id"], row),
    protocols={"rouge": summaries.PROTOCOL},
    notes=("Line ends \\r\\n of the original become \\n.",),
)
