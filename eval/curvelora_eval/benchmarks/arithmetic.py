"""What the arithmetic tasks in the LLM-Adapters format share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from curvelora_eval.benchmarks.base import ANY_NUMBER, Benchmark, Row, Split
from curvelora_eval.benchmarks.llm_adapters import SOURCE, reader
from curvelora_eval.benchmarks.protocols.answers import NumberProtocol
from curvelora_eval.benchmarks.protocols.generate import GenerateProtocol

RATIONALES = (
    "The outputs (rationales) were written by a language model and often end in another number than the answer, which is what "
    "counts: do not train on this file."
)


def make_row(name: str, record: Mapping[str, Any]) -> Row:
    """The instruction is the bare question."""
    return Row(name, {"instruction": record["instruction"], "output": record["output"]}, record["answer"])


read = reader(make_row)


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
        read=read,
        numbers=ANY_NUMBER,
        protocols={protocol.name: protocol},
        notes=(RATIONALES,),
    )
