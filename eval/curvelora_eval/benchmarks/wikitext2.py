"""WikiText-2: verified Wikipedia articles (Merity et al. 2016, arXiv 1609.07843)."""

from __future__ import annotations

from curvelora_eval.benchmarks import texts
from curvelora_eval.benchmarks.base import Benchmark, Split

BENCHMARK = Benchmark(
    name="wikitext2",
    kind="language_modelling",
    title="WikiText-2, Wikipedia articles in words",
    source="arXiv 1609.07843 (CC BY-SA 3.0)",
    splits={
        "train": Split(("wikitext-2/train.txt", "wikitext-2/wiki.train.tokens"), 36718),
        "validation": Split(("wikitext-2/valid.txt", "wikitext-2/wiki.valid.tokens"), 3760),
        "test": Split(("wikitext-2/test.txt", "wikitext-2/wiki.test.tokens"), 4358),
    },
    default_split="test",
    read=texts.read,
    protocols=texts.PROTOCOLS,
    unit="lines",
    count=texts.lines,
    take=texts.first_lines,
    notes=(
        "Rare words are written <unk> (wikitext-2-v1): scores differ from those on wikitext-2-raw-v1, which many papers use.",
        "Not read from the hub, whose copy has a row a line and leaves out the empty ones: its text is not this one.",
    ),
)
