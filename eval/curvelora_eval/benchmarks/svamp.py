"""SVAMP: word problems varied so that patterns mislead (Patel et al. 2021)."""

from __future__ import annotations

from curvelora_eval.benchmarks import arithmetic

BENCHMARK = arithmetic.benchmark(
    "svamp", "SVAMP", "SVAMP, varied word problems", "Patel et al. 2021, arXiv 2103.07191 (MIT)", 1000
)
