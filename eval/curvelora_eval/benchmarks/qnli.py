"""GLUE QNLI: does a sentence hold the answer to a question (from SQuAD, arXiv 1606.05250)?"""

from __future__ import annotations

from curvelora_eval.benchmarks import glue

TEXTS = ("question", "sentence")
BENCHMARK = glue.benchmark(
    "qnli",
    "QNLI, answers to questions",
    "QNLI",
    {"train": ("train", 104743, True), "validation": ("dev", 5463, True), "test": ("test", 5463, False)},
    glue.Table(TEXTS),
    glue.ENTAILMENT,
    {"accuracy": glue.ACCURACY},
    special={"test": glue.Table(TEXTS, label=None)},
    hub_texts=TEXTS,
)
