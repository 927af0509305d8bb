"""The intervals of the lab: medians of timings, ratios measured in the same rounds, means over seeds, rates of rare events.

Each function says what it assumes. None of them knows what its numbers mean, and all return plain floats and ints, with
None for what the data leave undefined.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from scipy import stats


def summarise(values: Sequence[float], level: float = 0.95) -> dict[str, float | int]:
    """Return `{"median", "low", "high", "p10", "p90", "n"}` of `values` (n,), in the values' own unit.

    low and high are order statistics: with X_(1) <= .. <= X_(n) and K ~ Binomial(n, 1/2), the interval
    [X_(k), X_(n-k+1)] holds the median of the distribution with probability 1 - 2 P(K <= k - 1), whatever the
    distribution; k is the largest that keeps this at `level` or more (David and Nagaraja, Order Statistics, 2003,
    section 7.1). The values must be independent draws. Where even [X_(1), X_(n)] falls short of the level (n < 6 at
    95 %), low and high are the minimum and the maximum, and hold the median with probability 1 - 2^(1-n) only: 94 % at
    n = 5, 50 % at n = 2, 0 at n = 1. p10 and p90 are linearly interpolated quantiles.

    Raises:
        ValueError: no value, one that is not finite, or a level outside (0, 1).
    """
    _require_level(level)
    x = np.sort(_finite_array(values, "a summary"))
    k = max(1, int(stats.binom.ppf((1 - level) / 2, len(x), 0.5)))
    p10, p90 = np.quantile(x, [0.1, 0.9]).tolist()
    return {
        "median": float(np.median(x)),
        "low": float(x[k - 1]),
        "high": float(x[-k]),
        "p10": p10,
        "p90": p90,
        "n": len(x),
    }


def paired_ratio(
    arm: Sequence[float], baseline: Sequence[float], level: float = 0.95, resamples: int = 2000, seed: int = 0
) -> dict[str, float | int]:
    """Return `{"ratio", "low", "high", "pairs"}`: how many times the baseline's value the arm's is (1.0 = the same).

    Args:
        arm, baseline: positive measurements (n,) each; the i-th of both come from the same round, so that what slows a
            round down (clocks, heat, neighbours) cancels.
        level: of the interval, in (0, 1).
        resamples: how many times the pairs are drawn again.
        seed: of the generator that draws them; it decides the interval.

    ratio is the median of arm_i / baseline_i; low and high are the percentile bootstrap of that median over pairs (Efron
    and Tibshirani, An Introduction to the Bootstrap, 1993, section 13.3). With few pairs the interval is too narrow (it
    cannot leave the range of the ratios; one pair gives low = high = ratio), so read it together with `pairs`.

    Raises:
        ValueError: lists of unequal length or empty, a value that is not finite and positive, a level outside (0, 1), or
            no resample.
    """
    _require_level(level)
    if resamples < 1:
        raise ValueError(f"resamples must be at least 1, found {resamples}")
    x, y = _finite_array(arm, "a paired ratio"), _finite_array(baseline, "a paired ratio")
    if len(x) != len(y):
        raise ValueError(
            f"a paired ratio needs as many values of the arm as of the baseline, found {len(x)} and {len(y)}"
        )
    if min(x.min(), y.min()) <= 0:
        raise ValueError(f"a paired ratio needs positive values, found {min(x.min(), y.min())}")
    ratios = x / y
    drawn = np.random.default_rng(seed).integers(0, len(ratios), (resamples, len(ratios)))
    low, high = np.quantile(np.median(ratios[drawn], axis=1), [(1 - level) / 2, (1 + level) / 2]).tolist()
    return {"ratio": float(np.median(ratios)), "low": low, "high": high, "pairs": len(ratios)}


def over_seeds(values: Iterable[float | None], level: float = 0.95) -> dict[str, float | int | None]:
    """Return `{"mean", "std", "low", "high", "n"}` of one value per seed: mean ± t sd / sqrt(n), Student's t, n - 1 degrees.

    std is the sample standard deviation (divisor n - 1). None and values that are not finite are dropped and n counts
    the rest; n = 1 leaves std, low and high None, and n = 0 the mean too. Assumes seeds that scatter about normally.

    Raises:
        ValueError: a level outside (0, 1).
    """
    _require_level(level)
    return _t_interval([v for v in map(_number, values) if math.isfinite(v)], level)


def paired_difference(
    arm: Sequence[float | None], baseline: Sequence[float | None], level: float = 0.95
) -> dict[str, float | int | bool | None]:
    """Return `{"mean", "low", "high", "n", "distinguishable"}` of arm - baseline, seed by seed, with Student's t interval.

    Args:
        arm, baseline: one value a seed, (n,) each, in the same order of seeds.
        level: of the interval, in (0, 1).

    A seed where either side is None or not finite is dropped. `distinguishable` says whether the interval leaves 0 out;
    it is None, as are low and high, where fewer than two seeds are left.

    Raises:
        ValueError: lists of unequal length, or a level outside (0, 1).
    """
    _require_level(level)
    if len(arm) != len(baseline):
        raise ValueError(
            f"a paired difference needs as many values of the arm as of the baseline, found {len(arm)} and {len(baseline)}"
        )
    differences = [_number(a) - _number(b) for a, b in zip(arm, baseline, strict=True)]
    found = _t_interval([d for d in differences if math.isfinite(d)], level)
    low, high = found["low"], found["high"]
    return {
        "mean": found["mean"],
        "low": low,
        "high": high,
        "n": found["n"],
        "distinguishable": None if low is None else bool(low > 0 or high < 0),
    }


def rate_interval(count: int, exposure: float, level: float = 0.95) -> dict[str, float]:
    """Return `{"rate", "low", "high"}` of `count` events in `exposure` units: the exact Poisson interval (Garwood 1936).

        low = chi2_{(1 - level) / 2}(2 count) / (2 exposure)      high = chi2_{(1 + level) / 2}(2 count + 2) / (2 exposure)

    with chi2_q(d) the q-quantile of chi-squared with d degrees of freedom; low is 0 where count is 0. The events must be
    independent: where they come in bursts the interval is too narrow.

    Raises:
        ValueError: a count that is not a whole number >= 0, an exposure that is not positive, a level outside (0, 1).
    """
    _require_level(level)
    if count < 0 or count != int(count):
        raise ValueError(f"a rate needs a whole number of events, at least 0, found {count}")
    if not (math.isfinite(exposure) and exposure > 0):
        raise ValueError(f"a rate needs a positive exposure, found {exposure}")
    low = stats.chi2.ppf((1 - level) / 2, 2 * count) / 2 if count else 0.0
    high = stats.chi2.ppf((1 + level) / 2, 2 * count + 2) / 2
    return {"rate": float(count / exposure), "low": float(low / exposure), "high": float(high / exposure)}


def _t_interval(values: list[float], level: float) -> dict[str, Any]:
    n = len(values)
    found: dict[str, Any] = dict.fromkeys(("mean", "std", "low", "high")) | {"n": n}
    if n:
        found["mean"] = float(np.mean(values))
    if n > 1:
        found["std"] = float(np.std(values, ddof=1))
        half = float(stats.t.ppf((1 + level) / 2, n - 1)) * found["std"] / math.sqrt(n)
        found["low"], found["high"] = found["mean"] - half, found["mean"] + half
    return found


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _finite_array(values: Sequence[float], what: str) -> np.ndarray:
    x = np.asarray(values, dtype=np.float64)
    if x.ndim != 1 or len(x) == 0:
        raise ValueError(f"{what} needs a list of at least one value, found shape {x.shape}")
    if not np.isfinite(x).all():
        raise ValueError(f"{what} needs finite values, found {x[~np.isfinite(x)][0]}")
    return x


def _require_level(level: float) -> None:
    if not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1, found {level}; write 0.95 for a 95 % interval")
