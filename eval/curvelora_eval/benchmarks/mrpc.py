"""GLUE MRPC: do two sentences say the same (Dolan and Brockett 2005)?"""

from __future__ import annotations

from curvelora_eval.benchmarks import glue

LABELS = ("not_equivalent", "equivalent")
BENCHMARK = glue.benchmark(
    "mrpc",
    "MRPC, paraphrases in news",
    "MRPC",
    {"train": ("train", 3668, True), "validation": ("dev", 408, True), "test": ("test", 1725, True)},
    glue.Table(("#1 String", "#2 String"), label="Quality"),
    LABELS,
    {"accuracy": glue.ACCURACY, "f1": glue.F1},
    written=dict(zip("01", LABELS, strict=True)),
)
