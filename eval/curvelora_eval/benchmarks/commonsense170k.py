"""commonsense_170k: LLM-Adapters' training set for the eight commonsense tasks, their training rows in one file."""

from __future__ import annotations

from curvelora_eval.benchmarks import arithmetic
from curvelora_eval.benchmarks.base import Benchmark, Split
from curvelora_eval.benchmarks.llm_adapters import SOURCE, reader
from curvelora_eval.benchmarks.protocols.answers import LabelProtocol

FILE = "commonsense_170k.json"
TRAINING = LabelProtocol(labels=(), max_new_tokens=32)
BENCHMARK = Benchmark(
    name="commonsense170k",
    kind="instruction",
    title="commonsense_170k, to train on",
    source=SOURCE,
    splits={"train": Split((f"commonsense/{FILE}", f"ft-training_set/{FILE}", FILE), 170420)},
    default_split="train",
    read=reader(arithmetic.make_row),
    protocols={},
    training=TRAINING,
    notes=(
        "The file is the only source: the tasks' own training files in one folder are not the same where some are missing.",
    ),
)
