"""WinoGrande: which of two names fills the blank (Sakaguchi et al. 2019, arXiv 1907.10641)."""

from __future__ import annotations

from curvelora_eval.benchmarks import commonsense
from curvelora_eval.benchmarks.base import Benchmark
from curvelora_eval.benchmarks.llm_adapters import SOURCE, Request, reader

REQUEST = Request(
    "Please choose the correct answer to fill in the blank to complete the given sentence: ",
    word="Option",
    labels=("option1", "option2"),
    before_labels=" ",
)
REPEATS = (
    "the six published training sizes one after the other, so most rows occur several times; the hub's XL has 40,398"
)

BENCHMARK = Benchmark(
    name="winogrande",
    kind="multiple_choice",
    title="WinoGrande, pronouns",
    source=f"arXiv 1907.10641 (CC BY 4.0); files of {SOURCE}",
    splits={
        "train": commonsense.split("winogrande", "train", 63238, "train", REPEATS),
        "test": commonsense.split("winogrande", "test", 1267, "validation", commonsense.TEST_IS_VALIDATION),
    },
    default_split="test",
    read=reader(REQUEST.parsed),
    hub=("allenai/winogrande", "winogrande_xl"),
    from_hub=lambda row, name: REQUEST.row(
        name, row["sentence"], (row["option1"], row["option2"]), REQUEST.labels[int(row["answer"]) - 1]
    ),
    answers=REQUEST.labels,
    protocols=commonsense.protocols(
        REQUEST,
        "{question}",
        blank="_",
        normalised=False,
        description="partial evaluation as in lm-evaluation-harness: the end of the sentence is scored after each name",
    ),
)
