"""GLUE SST-2: is a sentence of a film review positive (Socher et al. 2013)?"""

from __future__ import annotations

from curvelora_eval.benchmarks import glue

LABELS = ("negative", "positive")
BENCHMARK = glue.benchmark(
    "sst2",
    "SST-2, sentiment of sentences",
    "SST-2",
    {"train": ("train", 67349, True), "validation": ("dev", 872, True), "test": ("test", 1821, True)},
    glue.Table(("sentence",)),
    LABELS,
    {"accuracy": glue.ACCURACY},
    written=dict(zip("01", LABELS, strict=True)),
    hub_texts=("sentence",),
    notes=(
        "GLUE's own test file, and the hub's test split, have no labels; test is the labelled set of the corpus itself.",
    ),
)
