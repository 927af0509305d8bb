"""GLUE STS-B: how alike are two sentences, 0 to 5 (Cer et al. 2017, arXiv 1708.00055)?"""

from __future__ import annotations

from curvelora_eval.benchmarks import glue
from curvelora_eval.scoring import Score

ORIGINAL = ("genre", "file", "year", "id", "score", *glue.PAIR)
BENCHMARK = glue.benchmark(
    "stsb",
    "STS-B, similarity of sentences",
    "STS-B",
    {"train": ("train", 5749, True), "validation": ("dev", 1500, True), "test": ("test", 1379, True)},
    glue.Table(glue.PAIR, label="score"),
    None,
    {"pearson_spearman": (Score("pearson_spearman"),)},
    special={"test": glue.Table(glue.PAIR, label="score", header=ORIGINAL, further=True)},
    notes=(
        "GLUE's own test file, and the hub's test split, have no labels; test is the labelled set of the corpus itself.",
    ),
)
