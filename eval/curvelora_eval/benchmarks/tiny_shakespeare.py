"""Tiny Shakespeare: 40,000 lines of plays (Karpathy 2015, github.com/karpathy/char-rnn)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from curvelora_eval.benchmarks import texts
from curvelora_eval.benchmarks.base import Benchmark, Row, Split

TRAINED = 0.9  # of the characters; the rest is for validation


def read(path: Path, split: str) -> list[Row]:
    """The first 90 % of the characters, or the rest."""
    (row,) = texts.read(path, split)
    text = row.fields["text"]
    cut = int(TRAINED * len(text))
    return [replace(row, fields={"text": text[:cut] if split == "train" else text[cut:]})]


FILES = ("tiny-shakespeare/input.txt",)
BENCHMARK = Benchmark(
    name="tiny_shakespeare",
    kind="language_modelling",
    title="Tiny Shakespeare, plays",
    source="github.com/karpathy/char-rnn (MIT)",
    splits={"train": Split(FILES, 35526), "validation": Split(FILES, 4475)},
    default_split="validation",
    read=read,
    protocols=texts.PROTOCOLS,
    unit="lines",
    count=texts.lines,
    take=texts.first_lines,
    notes=("The file has no split; the first 90 % of its characters are for training, as nanoGPT cuts it.",),
)
