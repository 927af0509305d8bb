"""SingleEq: word problems that one equation solves (Koncel-Kedziorski et al. 2015)."""

from __future__ import annotations

from curvelora_eval.benchmarks import arithmetic

BENCHMARK = arithmetic.benchmark("singleeq", "SingleEq", "SingleEq, one equation", "Koncel-Kedziorski et al. 2015", 508)
