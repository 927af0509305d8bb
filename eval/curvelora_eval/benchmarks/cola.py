"""GLUE CoLA: is a sentence acceptable English (Warstadt et al. 2018, arXiv 1805.12471)?"""

from __future__ import annotations

from curvelora_eval.benchmarks import glue
from curvelora_eval.scoring import Score

LABELS = ("unacceptable", "acceptable")
BENCHMARK = glue.benchmark(
    "cola",
    "CoLA, acceptable sentences",
    "CoLA",
    {"train": ("train", 8551, True), "validation": ("dev", 1043, True), "test": ("test", 1063, False)},
    glue.Table(("sentence",), header=("source", "label", "mark", "sentence")),
    LABELS,
    {"matthews": (Score("matthews"),)},
    written=dict(zip("01", LABELS, strict=True)),
    special={"test": glue.Table(("sentence",), label=None)},
    hub_texts=("sentence",),
)
