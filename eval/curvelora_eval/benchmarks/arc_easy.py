"""ARC-Easy: the questions that simple baselines can answer."""

from __future__ import annotations

from curvelora_eval.benchmarks import arc

BENCHMARK = arc.benchmark("arc_easy", "ARC-Easy", "ARC-Easy, school science", train=2251, test=2376)
