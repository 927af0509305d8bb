"""BoolQ: yes/no questions (Clark et al. 2019, arXiv 1905.10044). LLM-Adapters asks without the passage."""

from __future__ import annotations

from curvelora_eval.benchmarks import commonsense
from curvelora_eval.benchmarks.base import Benchmark
from curvelora_eval.benchmarks.llm_adapters import SOURCE, Request, reader

REQUEST = Request("Please answer the following question with true or false, question: ", labels=("true", "false"))
LABELS = {True: "true", False: "false"}

BENCHMARK = Benchmark(
    name="boolq",
    kind="multiple_choice",
    title="BoolQ, yes/no questions without the passage",
    source=f"arXiv 1905.10044 (CC BY-SA 3.0); files of {SOURCE}",
    splits={
        "train": commonsense.split("boolq", "train", 9427, "train"),
        "test": commonsense.split("boolq", "test", 3270, "validation", commonsense.TEST_IS_VALIDATION),
    },
    default_split="test",
    read=reader(REQUEST.parsed),
    hub=("google/boolq", None),
    from_hub=lambda row, name: REQUEST.row(name, f"{row['question']}?", (), LABELS[row["answer"]]),
    answers=REQUEST.labels,
    protocols=commonsense.protocols(
        REQUEST,
        commonsense.QUESTION,
        choices={"false": "no", "true": "yes"},
        normalised=False,
        description="closed book: lm-evaluation-harness puts the passage before the question, which these files do not have",
    ),
    notes=("The passage is left out by LLM-Adapters, so this is not comparable with BoolQ scores that read it.",),
)
