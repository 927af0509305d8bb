"""GLUE MRPC: do two sentences say the same (Dolan and Brockett 2005)?"""

from __future__ import annotations

from pathlib import Path

from curvelora_eval.benchmarks import glue
from curvelora_eval.benchmarks.base import Benchmark, Row

LABELS = ("not_equivalent", "equivalent")
TEXTS = ("#1 String", "#2 String")


def read(path: Path, split: str) -> list[Row]:
    """Quality, #1 ID, #2 ID, #1 String, #2 String."""
    rows = glue.read_table(path, ("Quality", *TEXTS), header=True)
    return [
        glue.make_row(f"{split}-{i}", row, TEXTS, row["Quality"], dict(zip("01", LABELS, strict=True)))
        for i, row in enumerate(rows)
    ]


FOLDERS = ("mrpc", "MRPC")
BENCHMARK = Benchmark(
    name="mrpc",
    kind="classification",
    title="MRPC, paraphrases in news",
    source=glue.SOURCE,
    splits={
        "train": glue.split(FOLDERS, "train", 3668, "train"),
        "validation": glue.split(FOLDERS, "dev", 408, "validation"),
        "test": glue.split(FOLDERS, "test", 1725, "test"),
    },
    default_split="validation",
    read=read,
    hub=(glue.HUB, "mrpc"),
    from_hub=glue.hub_row(("sentence1", "sentence2"), LABELS),
    answers=LABELS,
    protocols=glue.classification(LABELS, glue.ACCURACY | glue.f1(2)),
)
