"""TinyStories: short stories in the words of small children (Eldan and Li 2023, arXiv 2305.07759)."""

from __future__ import annotations

from pathlib import Path

from curvelora_eval.benchmarks import texts
from curvelora_eval.benchmarks.base import Benchmark, Row, Split
from curvelora_eval.benchmarks.loading import read_text

END = "<|endoftext|>"


def read(path: Path, split: str) -> list[Row]:
    """One row a story; stories end with `<|endoftext|>`."""
    stories = [story.strip() for story in read_text(path).split(END)]
    return [Row(f"{split}-{i}", {"text": story}, None) for i, story in enumerate(filter(None, stories))]


BENCHMARK = Benchmark(
    name="tinystories",
    kind="language_modelling",
    title="TinyStories, stories for small children",
    source="arXiv 2305.07759 (CDLA-Sharing-1.0)",
    splits={
        "train": Split(("tinystories/TinyStories-train.txt",), 2119719, hub="train"),
        "validation": Split(("tinystories/TinyStories-valid.txt", "tinystories/sample.txt"), 21990, hub="validation"),
    },
    default_split="validation",
    read=read,
    hub=("roneneldan/TinyStories", None),
    from_hub=lambda row, name: Row(name, {"text": row["text"].strip()}, None),
    protocols=texts.PROTOCOLS,
)
