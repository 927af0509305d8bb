"""OpenBookQA: elementary science with a step of reasoning (Mihaylov et al. 2018, arXiv 1809.02789)."""

from __future__ import annotations

from curvelora_eval.benchmarks import arc, commonsense
from curvelora_eval.benchmarks.base import Benchmark
from curvelora_eval.benchmarks.llm_adapters import NUMBERED, SOURCE, Request, reader

REQUEST = Request(arc.REQUEST.opening, word="Answer", labels=NUMBERED[:4])

BENCHMARK = Benchmark(
    name="openbookqa",
    kind="multiple_choice",
    title="OpenBookQA, science facts without the book",
    source=f"arXiv 1809.02789 (Apache-2.0); files of {SOURCE}",
    splits={
        "train": commonsense.split("openbookqa", "train", 4957, "train"),
        "test": commonsense.split("openbookqa", "test", 500, "test"),
    },
    default_split="test",
    read=reader(REQUEST.parsed),
    hub=("allenai/openbookqa", "main"),
    from_hub=lambda row, name: arc.from_hub(row | {"question": row["question_stem"]}, name),
    answers=REQUEST.labels,
    protocols=commonsense.protocols(REQUEST, "{question}", labels=NUMBERED),
)
