"""AddSub: short stories with one addition or subtraction (Hosseini et al. 2014)."""

from __future__ import annotations

from curvelora_eval.benchmarks import arithmetic

BENCHMARK = arithmetic.benchmark(
    "addsub", "AddSub", "AddSub, one-step additions and subtractions", "Hosseini et al. 2014", 395
)
