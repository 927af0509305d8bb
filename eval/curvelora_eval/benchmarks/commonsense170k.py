"""commonsense_170k: LLM-Adapters' training set for the eight commonsense tasks, their training rows in one file."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

from curvelora_eval.benchmarks import arithmetic
from curvelora_eval.benchmarks.base import Benchmark, Split
from curvelora_eval.benchmarks.llm_adapters import SOURCE, reader
from curvelora_eval.benchmarks.loading import has_file
from curvelora_eval.benchmarks.protocols.answers import LabelProtocol

FILE = "commonsense_170k.json"
PARTS = ("boolq", "piqa", "siqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa")


def parts_there(data_dir: Path) -> str:
    """Which of the eight tasks' own training files are there and which are not."""
    splits = {name: import_module(f"{__package__}.{name}").BENCHMARK.splits["train"] for name in PARTS}
    missing = [name for name in PARTS if not has_file(splits[name], data_dir)]
    if not missing:
        return "the eight tasks' own training files are all there, and the file is all of them, in an order of its own"
    rows = sum(splits[name].published for name in PARTS if name not in missing)
    return (
        f"the eight tasks' own training files do not make it up: {', '.join(missing)} are missing as well, and the others have "
        f"{rows:,} of its 170,420 rows"
    )


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
    if_missing=parts_there,
    notes=(
        "The file is the only source: the tasks' own training files in one folder are not the same where some are missing.",
    ),
)
