"""AQuA: algebra with five choices (Ling et al. 2017, arXiv 1705.04146)."""

from __future__ import annotations

from curvelora_eval.benchmarks import arithmetic
from curvelora_eval.benchmarks.base import Benchmark, Split
from curvelora_eval.benchmarks.llm_adapters import SOURCE, reader
from curvelora_eval.benchmarks.protocols.answers import LetterProtocol

PROTOCOL = LetterProtocol(
    description="LLM-Adapters' evaluate.py: 4 beams, 256 new tokens, the first capital A to E in the text"
)
BENCHMARK = Benchmark(
    name="aqua",
    kind="arithmetic",
    title="AQuA, algebra with five choices",
    source=f"arXiv 1705.04146 (Apache-2.0); file of {SOURCE}",
    splits={"test": Split(("math/AQuA/test.json", "AQuA/test.json"), 254)},
    default_split="test",
    read=reader(arithmetic.make_row),
    answers=PROTOCOL.labels,
    protocols={PROTOCOL.name: PROTOCOL},
    notes=(
        "The original takes the first capital A to E anywhere, so a response that begins with 'A' or 'Answer' or 'Daniel' is "
        "read as a choice.",
        arithmetic.RATIONALES,
    ),
)
