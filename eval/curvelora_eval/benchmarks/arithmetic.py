"""What the arithmetic tasks in the LLM-Adapters format share."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from curvelora.errors import UserError
from curvelora_eval.benchmarks.base import Benchmark, Row, Split
from curvelora_eval.benchmarks.llm_adapters import SOURCE, read_records
from curvelora_eval.benchmarks.protocols.answers import NumberProtocol
from curvelora_eval.benchmarks.protocols.generate import GenerateProtocol

RATIONALES = (
    "The outputs (rationales) were written by a language model and often end in another number than the answer, which is what "
    "counts: do not train on this file."
)


def make_row(name: str, record: Mapping[str, Any]) -> Row:
    """The instruction is the bare question."""
    return Row(name, {"instruction": record["instruction"], "output": record["output"]}, record["answer"])


def read_numbers(path: Path, split: str) -> list[Row]:
    """Rows whose answers are numbers.

    Raises:
        UserError: an answer is none.
    """
    rows = [make_row(f"{split}-{i}", record) for i, record in enumerate(read_records(path))]
    if wrong := [row for row in rows if not _is_number(row.answer)]:
        raise UserError(
            f"{path}: {len(wrong)} rows have an answer that is no number (the first: {wrong[0].id} has {wrong[0].answer!r})"
        )
    return rows


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def benchmark(name: str, folder: str, title: str, paper: str, published: int) -> Benchmark:
    """A task of numbers in `math/<folder>/test.json` or `<folder>/test.json`."""
    protocol: GenerateProtocol = NumberProtocol(
        description="LLM-Adapters' evaluate.py: 4 beams, 256 new tokens, the last number in the text"
    )
    return Benchmark(
        name=name,
        kind="arithmetic",
        title=title,
        source=f"{paper}; file of {SOURCE}",
        splits={"test": Split((f"math/{folder}/test.json", f"{folder}/test.json"), published)},
        default_split="test",
        read=read_numbers,
        protocols={protocol.name: protocol},
        notes=(RATIONALES,),
    )
