"""Social IQa: what people feel, want and do next (Sap et al. 2019, arXiv 1904.09728)."""

from __future__ import annotations

from curvelora_eval.benchmarks import commonsense
from curvelora_eval.benchmarks.base import Benchmark
from curvelora_eval.benchmarks.llm_adapters import NUMBERED, SOURCE, Request, reader

REQUEST = Request("Please choose the correct answer to the question: ", word="Answer", labels=NUMBERED[:3])

BENCHMARK = Benchmark(
    name="siqa",
    kind="multiple_choice",
    title="Social IQa, social common sense",
    source=f"arXiv 1904.09728 (CC BY 4.0); files of {SOURCE}",
    splits={
        "train": commonsense.split("social_i_qa", "train", 33410, "train"),
        "test": commonsense.split("social_i_qa", "test", 1954, "validation", commonsense.TEST_IS_VALIDATION),
    },
    default_split="test",
    read=reader(REQUEST.parsed),
    hub=("allenai/social_i_qa", None),
    from_hub=lambda row, name: REQUEST.row(
        name,
        f"{row['context']} {row['question']}",
        (row["answerA"], row["answerB"], row["answerC"]),
        REQUEST.labels[int(row["label"]) - 1],
    ),
    answers=REQUEST.labels,
    protocols=commonsense.protocols(REQUEST, "Q: {question}\nA:", normalised=False, labels=NUMBERED),
)
