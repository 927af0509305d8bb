"""GLUE QQP: are two questions the same (Quora 2017)?"""

from __future__ import annotations

from curvelora_eval.benchmarks import glue

TEXTS = ("question1", "question2")
LABELS = ("not_duplicate", "duplicate")
BENCHMARK = glue.benchmark(
    "qqp",
    "QQP, duplicate questions",
    "QQP",
    {"train": ("train", 363846, True), "validation": ("dev", 40430, True), "test": ("test", 390965, False)},
    glue.Table(TEXTS, label="is_duplicate", skip_broken=True),
    LABELS,
    {"accuracy": glue.ACCURACY, "f1": glue.F1},
    written=dict(zip("01", LABELS, strict=True)),
    special={"test": glue.Table(TEXTS, label=None, skip_broken=True)},
    hub_texts=TEXTS,
    notes=(
        "GLUE's file has a few lines that are cut off; they are left out, as everywhere, and counted in the result. A file with "
        "more than one in 1,000 of them is refused.",
    ),
)
