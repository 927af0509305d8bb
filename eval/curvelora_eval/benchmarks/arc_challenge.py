"""ARC-Challenge: the questions that retrieval and co-occurrence answer wrongly."""

from __future__ import annotations

from curvelora_eval.benchmarks import arc

BENCHMARK = arc.benchmark("arc_challenge", "ARC-Challenge", "ARC-Challenge, hard school science", train=1119, test=1172)
