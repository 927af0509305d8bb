"""What ARC's two parts share (Clark et al. 2018, arXiv 1803.05457): school science with three to five options."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from curvelora_eval.benchmarks import commonsense
from curvelora_eval.benchmarks.base import Benchmark, Row
from curvelora_eval.benchmarks.llm_adapters import NUMBERED, SOURCE, Request, reader

REQUEST = Request("Please choose the correct answer to the question: ", word="Answer", labels=NUMBERED)


def from_hub(row: Mapping[str, Any], name: str) -> Row:
    """Columns question, choices {label, text}, answerKey: a letter, or a digit in some rows."""
    options = row["choices"]
    return REQUEST.row(
        name, row["question"], tuple(options["text"]), NUMBERED[list(options["label"]).index(row["answerKey"])]
    )


def benchmark(name: str, part: str, title: str, train: int, test: int) -> Benchmark:
    """One part; `part` names its folder, and its config on the hub."""
    return Benchmark(
        name=name,
        kind="multiple_choice",
        title=title,
        source=f"arXiv 1803.05457 (CC BY-SA 4.0); files of {SOURCE}",
        splits={
            "train": commonsense.split(part, "train", train, "train"),
            "test": commonsense.split(part, "test", test, "test"),
        },
        default_split="test",
        read=reader(REQUEST.parsed),
        hub=("allenai/ai2_arc", part),
        from_hub=from_hub,
        answers=NUMBERED,
        protocols=commonsense.protocols(REQUEST, commonsense.QUESTION),
    )
