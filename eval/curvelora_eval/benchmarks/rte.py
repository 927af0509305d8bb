"""GLUE RTE: does one text follow from another (the RTE challenges 1, 2, 3 and 5)?"""

from __future__ import annotations

from curvelora_eval.benchmarks import glue

BENCHMARK = glue.benchmark(
    "rte",
    "RTE, textual entailment",
    "RTE",
    {"train": ("train", 2490, True), "validation": ("dev", 277, True), "test": ("test", 3000, False)},
    glue.Table(glue.PAIR),
    glue.ENTAILMENT,
    {"accuracy": glue.ACCURACY},
    special={"test": glue.Table(glue.PAIR, label=None)},
)
