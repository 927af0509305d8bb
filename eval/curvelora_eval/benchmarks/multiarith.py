"""MultiArith: word problems of several steps (Roy and Roth 2015)."""

from __future__ import annotations

from curvelora_eval.benchmarks import arithmetic

BENCHMARK = arithmetic.benchmark(
    "multiarith", "MultiArith", "MultiArith, several steps", "Roy and Roth 2015, arXiv 1608.01413", 600
)
