"""The intervals of the lab against scipy, cases worked out by hand, and their coverage in simulations with fixed seeds.

A share of m simulations has a standard error of sqrt(0.95 * 0.05 / m), 0.005 at m = 2000; the bounds below lie four of these
away from what theory gives.
"""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from scipy import stats

from curvelora_eval.lab.statistics import over_seeds, paired_difference, paired_ratio, rate_interval, summarise


def share_that_holds(truth, intervals):
    return np.mean([found["low"] <= truth <= found["high"] for found in intervals])


# --- medians of timings ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "ranks"),
    [(1, (1, 1)), (2, (1, 2)), (5, (1, 5)), (6, (1, 6)), (8, (1, 8)), (9, (2, 8)), (20, (6, 15)), (100, (40, 61))],
)
def test_the_interval_of_the_median_has_the_ranks_of_the_tables(n, ranks):
    """Ranks at 95 % as tabulated (e.g. Conover, Practical Nonparametric Statistics): n = 9 gives 2 and 8, n = 20 6 and 15."""
    values = np.random.default_rng(n).permutation(np.arange(1, n + 1)) * 10.0
    found = summarise(values.tolist())
    assert (found["low"], found["high"]) == (ranks[0] * 10, ranks[1] * 10)
    assert found["n"] == n and found["median"] == (n + 1) * 5


@pytest.mark.parametrize("n", [6, 25, 80])
def test_the_ranks_are_the_tightest_that_keep_the_level(n):
    low = summarise(list(range(1, n + 1)))["low"]  # the value is its rank
    assert 1 - 2 * stats.binom.cdf(low - 1, n, 0.5) >= 0.95 > 1 - 2 * stats.binom.cdf(low, n, 0.5)


def test_a_summary_worked_out_by_hand():
    found = summarise([4.0, 1.0, 3.0, 2.0, 11.0])
    assert found == {
        "median": 3.0,
        "low": 1.0,
        "high": 11.0,
        "p10": pytest.approx(1.4),
        "p90": pytest.approx(8.2),
        "n": 5,
    }
    assert summarise([7.0]) == {"median": 7.0, "low": 7.0, "high": 7.0, "p10": 7.0, "p90": 7.0, "n": 1}


@pytest.mark.parametrize("n", [5, 25])
def test_the_interval_of_the_median_covers_as_the_binomial_says(n):
    """Skewed draws; the exact coverage is 1 - 2 P(K <= k - 1): 0.9375 at n = 5, 0.957 at n = 25."""
    rng = np.random.default_rng(3)
    held = share_that_holds(math.log(2), [summarise(rng.exponential(size=n)) for _ in range(2000)])
    exact = {5: 1 - 2 * 0.5**5, 25: 1 - 2 * stats.binom.cdf(7, 25, 0.5)}[n]
    assert held == pytest.approx(exact, abs=0.02)


@pytest.mark.parametrize(
    ("values", "message"),
    [([], "at least one value"), ([1.0, math.nan], "finite"), ([[1.0]], "shape"), ([math.inf], "inf")],
)
def test_a_summary_refuses(values, message):
    with pytest.raises(ValueError, match=message):
        summarise(values)


# --- ratios in the same rounds --------------------------------------------------------------------------------------


def test_a_constant_ratio_has_no_width_however_the_rounds_vary():
    """The rounds differ tenfold; 1.25 and powers of two divide without rounding."""
    baseline = [0.5, 4.0, 1.0, 2.0, 8.0, 0.25]
    found = paired_ratio([1.25 * b for b in baseline], baseline)
    assert found == {"ratio": 1.25, "low": 1.25, "high": 1.25, "pairs": 6}


def test_the_bootstrap_agrees_with_the_exact_distribution_of_three_pairs():
    """The resampled median of ratios 1 < 2 < 3 is 1 with probability 7/27, 2 with 13/27 and 3 with 7/27.

    So the 30 % and 70 % quantiles are both 2, and the 20 % and 80 % quantiles 1 and 3.
    """
    arm, baseline = [3.0, 2.0, 8.0], [1.0, 2.0, 4.0]
    assert paired_ratio(arm, baseline, level=0.4) == {"ratio": 2.0, "low": 2.0, "high": 2.0, "pairs": 3}
    assert paired_ratio(arm, baseline, level=0.6) == {"ratio": 2.0, "low": 1.0, "high": 3.0, "pairs": 3}


def test_the_bootstrap_agrees_with_scipy():
    rng = np.random.default_rng(8)
    baseline = rng.uniform(1, 2, 40)
    arm = baseline * rng.lognormal(0.1, 0.05, 40)
    found = paired_ratio(arm, baseline, resamples=20_000)
    reference = stats.bootstrap(
        (arm / baseline,), np.median, n_resamples=20_000, method="percentile", rng=np.random.default_rng(1)
    ).confidence_interval
    width = reference.high - reference.low
    # two independent bootstraps of 20,000; the quantiles of each are good to about 1 % of the width
    assert found["low"] == pytest.approx(reference.low, abs=0.05 * width)
    assert found["high"] == pytest.approx(reference.high, abs=0.05 * width)


def test_the_bootstrap_covers_and_pairing_is_what_makes_it_narrow():
    """Rounds vary by 30 %, the ratio by 2 % about 1.1. Bootstraps of a median of 30 cover 0.93 to 0.96."""
    rng = np.random.default_rng(5)
    found = []
    for _ in range(500):
        baseline = rng.lognormal(0, 0.3, 30)
        found.append(paired_ratio(1.1 * baseline * rng.lognormal(0, 0.02, 30), baseline, resamples=300))
    assert 0.90 <= share_that_holds(1.1, found) <= 0.985
    assert np.median([f["high"] - f["low"] for f in found]) < 0.03


def test_the_seed_of_the_bootstrap_decides():
    arm, baseline = np.random.default_rng(0).uniform(1, 2, (2, 15))
    first, again, other = (paired_ratio(arm, baseline, seed=seed, resamples=50) for seed in (1, 1, 2))
    assert first == again and first != other


@pytest.mark.parametrize(
    ("arm", "baseline", "options", "message"),
    [
        ([], [], {}, "at least one value"),
        ([1.0, 2.0], [1.0], {}, "found 2 and 1"),
        ([1.0, 0.0], [1.0, 1.0], {}, "positive values, found 0"),
        ([1.0], [-2.0], {}, "positive values, found -2"),
        ([1.0], [math.nan], {}, "finite"),
        ([1.0], [1.0], {"level": 95}, "level must lie"),
        ([1.0], [1.0], {"resamples": 0}, "resamples"),
    ],
)
def test_a_ratio_refuses(arm, baseline, options, message):
    with pytest.raises(ValueError, match=message):
        paired_ratio(arm, baseline, **options)


# --- seeds ----------------------------------------------------------------------------------------------------------


def test_over_seeds_worked_out_by_hand():
    """1, 2, 3: mean 2, sd 1, and t_0.975 with 2 degrees of freedom is 4.302653."""
    half = 4.302653 / math.sqrt(3)
    found = over_seeds([1.0, None, 3.0, math.nan, 2.0, math.inf])
    assert found == {
        "mean": 2.0,
        "std": 1.0,
        "low": pytest.approx(2 - half, abs=1e-6),
        "high": pytest.approx(2 + half, abs=1e-6),
        "n": 3,
    }


def test_over_seeds_agrees_with_scipy():
    values = np.random.default_rng(2).normal(5, 2, 7)
    low, high = stats.ttest_1samp(values, 0).confidence_interval(0.9)
    found = over_seeds(values.tolist(), level=0.9)
    assert (found["low"], found["high"]) == pytest.approx((low, high), rel=1e-12)


def test_one_seed_has_no_spread_and_none_has_nothing():
    assert over_seeds([None, 4]) == {"mean": 4.0, "std": None, "low": None, "high": None, "n": 1}
    assert over_seeds([None, math.nan]) == {"mean": None, "std": None, "low": None, "high": None, "n": 0}
    assert over_seeds([]) == over_seeds([None])


@pytest.mark.parametrize("level", [0.8, 0.95])
def test_the_interval_over_three_seeds_covers(level):
    """A normal interval instead of Student's would hold the mean in 0.69 and 0.81 of the draws."""
    rng = np.random.default_rng(4)
    held = share_that_holds(1.5, [over_seeds(rng.normal(1.5, 0.3, 3), level) for _ in range(2000)])
    assert held == pytest.approx(level, abs=4 * math.sqrt(level * (1 - level) / 2000))


def test_a_paired_difference_cancels_what_a_seed_shares():
    """Seeds scatter by 1, the difference is 0.01 on each to within 0.001: clear in pairs, lost without them."""
    rng = np.random.default_rng(6)
    baseline = rng.normal(0, 1, 5)
    arm = baseline + 0.01 + rng.normal(0, 0.001, 5)
    found = paired_difference(arm, baseline)
    low, high = stats.ttest_rel(arm, baseline).confidence_interval(0.95)
    assert (found["low"], found["high"]) == pytest.approx((low, high), rel=1e-9)
    assert found["distinguishable"] is True and found["n"] == 5 and found["mean"] == pytest.approx(0.01, abs=0.002)
    assert paired_difference(baseline, arm)["distinguishable"] is True  # also below zero
    assert over_seeds(baseline)["low"] < over_seeds(arm)["mean"] < over_seeds(baseline)["high"]


def test_a_difference_within_its_interval_is_not_distinguishable():
    found = paired_difference([1.0, 2.0, 3.0], [2.0, 2.0, 2.0])
    assert found["mean"] == 0.0 and found["low"] == -found["high"] < 0 and found["distinguishable"] is False
    assert paired_difference([2.0, 3.0], [2.0, 3.0])["distinguishable"] is False


def test_the_level_decides_what_is_distinguishable():
    """Differences 1, 2, 3: t = 2 / (1 / sqrt(3)) = 3.46, p = 0.074."""
    arm, baseline = [2.0, 4.0, 6.0], [1.0, 2.0, 3.0]
    assert paired_difference(arm, baseline, 0.92)["distinguishable"] is True
    assert paired_difference(arm, baseline, 0.93)["distinguishable"] is False


def test_a_seed_that_lacks_a_side_is_dropped_from_the_difference():
    found = paired_difference([1.0, None, 3.0, 9.0], [0.5, 1.0, 2.0, math.nan])
    assert (found["mean"], found["n"]) == (0.75, 2)
    one = paired_difference([1.0, None], [0.5, 1.0])
    assert one == {"mean": 0.5, "low": None, "high": None, "n": 1, "distinguishable": None}
    assert paired_difference([], []) == {"mean": None, "low": None, "high": None, "n": 0, "distinguishable": None}
    with pytest.raises(ValueError, match="found 1 and 2"):
        paired_difference([1.0], [1.0, 2.0])


# --- rates ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "low", "high"), [(0, 0.0, 3.689), (1, 0.0253, 5.572), (10, 4.795, 18.39)])
def test_poisson_limits_as_tabulated(count, low, high):
    """The 95 % limits in the table of Garwood (1936), to its digits."""
    found = rate_interval(count, 1.0)
    assert found["rate"] == count
    assert (found["low"], found["high"]) == (pytest.approx(low, abs=5e-4), pytest.approx(high, abs=5e-3))


@pytest.mark.parametrize("count", [1, 4, 30])
def test_poisson_limits_leave_half_the_rest_on_either_side(count):
    found = rate_interval(count, 5.0, level=0.9)
    assert stats.poisson.sf(count - 1, 5 * found["low"]) == pytest.approx(0.05)
    assert stats.poisson.cdf(count, 5 * found["high"]) == pytest.approx(0.05)
    assert found["rate"] == count / 5


def test_the_poisson_interval_never_covers_too_little():
    for expected in (0.5, 3.0, 12.0):
        counts = np.arange(80)
        held = [found["low"] <= expected <= found["high"] for found in (rate_interval(int(k), 1.0) for k in counts)]
        coverage = stats.poisson.pmf(counts, expected)[held].sum()
        assert 0.95 <= coverage < 0.995


@pytest.mark.parametrize(("count", "exposure"), [(-1, 1.0), (1.5, 1.0), (1, 0.0), (1, math.inf), (1, math.nan)])
def test_a_rate_refuses(count, exposure):
    with pytest.raises(ValueError, match="a rate needs"):
        rate_interval(count, exposure)


def test_everything_is_plain_data():
    x = np.arange(1, 8, dtype=np.float32)
    found = [summarise(x), paired_ratio(x, x), over_seeds(x), paired_difference(x, x), rate_interval(np.int64(3), x[1])]
    json.dumps(found, allow_nan=False)
    assert {type(v) for f in found for v in f.values()} == {float, int, bool}
