"""MetaMathQA: rewritten and augmented GSM8K and MATH questions, to train on (Yu et al. 2023, arXiv 2309.12284)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from curvelora_eval.benchmarks.base import Benchmark, Row, Split
from curvelora_eval.benchmarks.llm_adapters import read_records
from curvelora_eval.benchmarks.protocols.answers import MetaMathProtocol


def make_row(name: str, record: Mapping[str, Any]) -> Row:
    """The response ends in "The answer is: ..." and is learnt as it is."""
    return Row(name, {"instruction": record["query"], "output": record["response"]}, record["response"])


def read(path: Path, split: str) -> list[Row]:
    """A JSON list of query and response."""
    return [make_row(f"{split}-{i}", row) for i, row in enumerate(read_records(path, ("query", "response")))]


BENCHMARK = Benchmark(
    name="metamathqa",
    kind="instruction",
    title="MetaMathQA, to train on",
    source="arXiv 2309.12284, meta-math/MetaMathQA on the hub (MIT)",
    splits={"train": Split(("metamathqa/MetaMathQA-395K.json", "MetaMathQA-395K.json"), 395000, hub="train")},
    default_split="train",
    read=read,
    hub=("meta-math/MetaMathQA", None),
    from_hub=lambda row, name: make_row(name, row),
    protocols={},
    training=MetaMathProtocol(),
)
