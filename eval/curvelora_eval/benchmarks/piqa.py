"""PIQA: which of two ways to do something works (Bisk et al. 2020, arXiv 1911.11641)."""

from __future__ import annotations

from curvelora_eval.benchmarks import commonsense
from curvelora_eval.benchmarks.base import Benchmark
from curvelora_eval.benchmarks.llm_adapters import SOURCE, Request, reader

REQUEST = Request(
    "Please choose the correct solution to the question: ",
    word="Solution",
    labels=("solution1", "solution2"),
    between="\n\n",
)

BENCHMARK = Benchmark(
    name="piqa",
    kind="multiple_choice",
    title="PIQA, physical common sense",
    source=f"arXiv 1911.11641 (AFL 3.0); files of {SOURCE}",
    splits={
        "train": commonsense.split("piqa", "train", 16113, "train"),
        "test": commonsense.split("piqa", "test", 1838, "validation", commonsense.TEST_IS_VALIDATION),
    },
    default_split="test",
    read=reader(REQUEST.parsed),
    hub=("baber/piqa", None),
    from_hub=lambda row, name: REQUEST.row(
        name, row["goal"], (row["sol1"], row["sol2"]), REQUEST.labels[int(row["label"])]
    ),
    answers=REQUEST.labels,
    protocols=commonsense.protocols(REQUEST, commonsense.QUESTION),
)
