"""GLUE MNLI: does a sentence follow, contradict, or neither (Williams et al. 2018, arXiv 1704.05426)?"""

from __future__ import annotations

from curvelora_eval.benchmarks import glue

NO_LABEL = glue.Table(glue.PAIR, label=None)
BENCHMARK = glue.benchmark(
    "mnli",
    "MNLI, entailment in ten genres",
    "MNLI",
    {
        "train": ("train", 392702, True),
        "validation_matched": ("dev_matched", 9815, True),
        "validation_mismatched": ("dev_mismatched", 9832, True),
        "test_matched": ("test_matched", 9796, False),
        "test_mismatched": ("test_mismatched", 9847, False),
    },
    glue.Table(glue.PAIR, label="gold_label"),
    ("entailment", "neutral", "contradiction"),
    {"accuracy": glue.ACCURACY},
    special={"test_matched": NO_LABEL, "test_mismatched": NO_LABEL},
    hub_texts=("premise", "hypothesis"),
    default_split="validation_matched",
)
