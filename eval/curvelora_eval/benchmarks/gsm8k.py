"""GSM8K: grade-school word problems (Cobbe et al. 2021, arXiv 2110.14168)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from curvelora.errors import UserError
from curvelora_eval.benchmarks import arithmetic
from curvelora_eval.benchmarks.base import ANY_NUMBER, Benchmark, Row, Split
from curvelora_eval.benchmarks.llm_adapters import read_records
from curvelora_eval.benchmarks.protocols.answers import MetaMathProtocol, NumberProtocol

MARK = "#### "
CALCULATION = re.compile(r"<<[^>]*>>")


def make_row(name: str, record: Mapping[str, Any]) -> Row:
    """`answer` is the solution with the number after `####`; calculator marks `<<2*3=6>>` are left out of what is learnt."""
    solution, mark, number = record["answer"].rpartition(MARK)
    if not mark:
        raise UserError(f"row {name} has no {MARK.strip()!r} in its answer, behind which the number should stand")
    solution, number = CALCULATION.sub("", solution).strip(), number.strip().replace(",", "")
    fields = {"instruction": record["question"], "solution": solution, "output": f"{solution} The answer is {number}."}
    return Row(name, fields, number)


def read(path: Path, split: str) -> list[Row]:
    """JSON lines of question and answer, or LLM-Adapters' JSON list (the same questions, answers as "18.0")."""
    if ".json" in path.suffixes:
        return arithmetic.read(path, split)
    return [make_row(f"{split}-{i}", row) for i, row in enumerate(read_records(path, ("question", "answer")))]


GENERATE = (
    NumberProtocol(description="LLM-Adapters' evaluate.py: 4 beams, 256 new tokens, the last number in the text"),
    MetaMathProtocol(
        description="PiSSA and MiLoRA: greedy, 1,024 new tokens, the number after the last 'The answer is: '; unlike there, an "
        "answer a hundred times too large or too small is wrong (quirk metamath-hundredfold)"
    ),
)
BENCHMARK = Benchmark(
    name="gsm8k",
    kind="arithmetic",
    title="GSM8K, grade-school word problems",
    source="arXiv 2110.14168, github.com/openai/grade-school-math (MIT)",
    splits={
        "train": Split(("gsm8k/train.jsonl",), 7473, hub="train"),
        "test": Split(("gsm8k/test.jsonl", "gsm8k/test.json"), 1319, hub="test"),
    },
    default_split="test",
    read=read,
    numbers=ANY_NUMBER,
    hub=("openai/gsm8k", "main"),
    from_hub=lambda row, name: make_row(name, row),
    protocols={protocol.name: protocol for protocol in GENERATE},
)
