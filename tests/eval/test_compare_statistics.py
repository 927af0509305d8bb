"""The statistics of a comparison against scipy and worked cases, and how often they see a difference where there is none."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from curvelora_eval.compare import paired
from curvelora_eval.compare.verdict import NOT_DISTINGUISHABLE, decide, rule

pytestmark = pytest.mark.usefixtures("offline")


def mean_of(values):
    return lambda rows: {"mean": values[rows].mean()}


def draws_of(values, resamples, seed):
    """Resampled means of one arm, (runs, resamples), from row scores (runs, rows)."""
    return np.array([paired.resampled(mean_of(run), len(run), resamples, [seed, 1])["mean"] for run in values])


@pytest.mark.parametrize(("only_a", "only_b"), [(0, 0), (1, 9), (9, 1), (5, 5), (12, 3), (40, 61), (0, 5), (0, 6)])
def test_mcnemar_is_the_binomial_test_on_the_rows_that_differ(only_a, only_b):
    both, neither = 30, 7
    a = np.repeat([1, 1, 0, 0], [both, only_a, only_b, neither])
    b = np.repeat([1, 0, 1, 0], [both, only_a, only_b, neither])
    order = np.random.default_rng(0).permutation(len(a))
    found = paired.mcnemar(a[order], b[order])
    assert (found["both_right"], found["only_a"], found["only_b"], found["both_wrong"]) == (
        both,
        only_a,
        only_b,
        neither,
    )
    n = only_a + only_b
    by_hand = min(1.0, 2 * stats.binom.cdf(min(only_a, only_b), n, 0.5))
    assert found["p"] == pytest.approx(by_hand)
    assert found["p"] == pytest.approx(stats.binomtest(only_a, n).pvalue if n else 1.0)


def test_mcnemar_by_hand():
    # 1 against 9: 2 (1 + 10) / 2^10
    assert paired.mcnemar(np.repeat([1, 0], [1, 9]), np.repeat([0, 1], [1, 9]))["p"] == pytest.approx(22 / 1024)


def test_holm_by_hand():
    # sorted 0.005, 0.01, 0.03, 0.04 times 4, 3, 2, 1, none below the one before
    assert paired.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert paired.holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])
    assert paired.holm([]) == []


def test_the_interval_is_scipys_paired_bootstrap():
    """Both sides of a pair are drawn together: scipy's interval of the mean difference, within Monte-Carlo error.

    A bound of 4000 resamples of a standard error of 0.07 scatters by about 0.003.
    """
    rng = np.random.default_rng(1)
    a = rng.normal(size=200)
    b = a + rng.normal(0.1, 1, size=200)
    draws = paired.difference_draws(
        draws_of([a], 4000, 3), draws_of([b], 4000, 3), paired.draw_seeds(1, 1, False, 4000, [0])
    )
    found = paired.summarise(draws, 0.95, 200)
    rows = np.random.default_rng([3, 1]).integers(0, 200, 200)
    assert draws[0] == pytest.approx((b - a)[rows].mean())  # the very rows, for both
    wanted = stats.bootstrap((b - a,), np.mean, n_resamples=4000, method="percentile", rng=np.random.default_rng(0))
    assert found["low"] == pytest.approx(wanted.confidence_interval.low, abs=0.015)
    assert found["high"] == pytest.approx(wanted.confidence_interval.high, abs=0.015)


def test_p_turns_the_interval_round():
    draws = np.concatenate([np.full(30, -1.0), np.full(970, 1.0)])
    found = paired.summarise(draws, 0.95, 100)
    assert found["p"] == pytest.approx(2 * 31 / 1001) and found["low"] < 0 < found["high"]
    assert paired.summarise(draws, 0.9, 100)["low"] > 0  # p = 0.062 lies between 1 - 0.95 and 1 - 0.9
    assert paired.summarise(np.ones(99), 0.95, 100)["p"] == pytest.approx(0.02)
    assert paired.summarise(np.zeros(99), 0.95, 100)["p"] == 1.0


def test_few_rows_claim_no_more_than_a_sign_test_could():
    """All draws of a few rows that point one way are above 0; Wilcoxon's and the sign test's exact p is 2 / 2^n."""
    draws = np.ones(1999)
    nothing = {"low": None, "high": None, "p": None}
    assert [paired.summarise(draws, 0.95, n) for n in (1, 5)] == [nothing, nothing]
    for n in (6, 8, 10):
        wanted = stats.wilcoxon(np.arange(1.0, n + 1), method="exact").pvalue
        assert paired.summarise(draws, 0.95, n)["p"] == pytest.approx(wanted)
    assert paired.summarise(draws, 0.95, 40)["p"] == pytest.approx(2 / 2000)


def test_undefined_draws_are_dropped_and_counted():
    found = paired.summarise(np.array([np.nan, 1.0, 2.0, np.nan]), 0.95, 100)
    assert found["dropped"] == 2 and 1 <= found["low"] <= found["high"] <= 2
    assert paired.summarise(np.array([np.nan]), 0.95, 100) == {"low": None, "high": None, "p": None, "dropped": 1}


def test_two_equal_models_look_different_in_one_of_twenty_test_sets():
    """200 test sets of 200 rows, two models right on 70 % of them each, most of them the same rows.

    The 95 % interval leaves 0 out in about 10; 2 to 21 hold 99.9 % of Binomial(200, 0.05).
    """
    rng = np.random.default_rng(21)
    one = paired.draw_seeds(1, 1, False, 200, [0])
    left_out = small = 0
    for trial in range(200):
        hard = rng.random(200)
        a, b = ((hard + rng.normal(0, 0.25, 200) < 0.7).astype(float) for _ in "ab")
        draws = paired.difference_draws(draws_of([a], 200, trial), draws_of([b], 200, trial), one)
        found = paired.summarise(draws, 0.95, 200)
        left_out += found["low"] > 0 or found["high"] < 0
        small += paired.mcnemar(a, b)["p"] < 0.05
    low, high = stats.binom.ppf([0.0005, 0.9995], 200, 0.05)
    assert low <= left_out <= high
    assert small <= left_out  # the exact test never claims more than its level


def two_arms(rng, gain=0.0, runs=3, rows=150):
    """Row scores (runs, rows) of two arms whose runs scatter by their training seed, sd 0.05, on shared rows."""
    hard = rng.normal(size=rows)
    return [
        centre + rng.normal(0, 0.05, (runs, 1)) + 0.2 * hard + 0.1 * rng.normal(size=(runs, rows))
        for centre in (0, gain)
    ]


def test_seeds_that_scatter_are_no_difference():
    """With 3 runs an arm the bootstrap alone claims far too much, so the t-test over seeds decides with it."""
    rng = np.random.default_rng(8)
    bootstrap = both = found_true = 0
    for trial in range(80):
        for gain in (0.0, 0.4):
            a, b = two_arms(rng, gain)
            seeds = paired.draw_seeds(3, 3, False, 100, [trial, 0])
            found = paired.summarise(
                paired.difference_draws(draws_of(a, 100, trial), draws_of(b, 100, trial), seeds), 0.95, 150
            )
            over_seeds = paired.seeds_test(a.mean(axis=1), b.mean(axis=1), paired=False)
            if gain:
                found_true += max(found["p"], over_seeds["p"]) < 0.05
            else:
                bootstrap += found["p"] < 0.05
                both += max(found["p"], over_seeds["p"]) < 0.05
    assert bootstrap > 8  # 10 %, twice what it should be
    assert both <= stats.binom.ppf(0.9995, 80, 0.05)
    assert found_true > 72


def test_rows_and_seeds_both_widen_the_interval():
    rng = np.random.default_rng(4)
    a, b = two_arms(rng, runs=5)
    width = lambda draws: np.ptp(np.quantile(draws, [0.025, 0.975]))  # noqa: E731
    rows_of_a, rows_of_b = draws_of(a, 500, 0), draws_of(b, 500, 0)
    fixed = np.tile(np.arange(5), (500, 1))
    seeds = paired.draw_seeds(5, 5, False, 500, [0])
    still = [np.repeat(x.mean(axis=1)[:, None], 500, axis=1) for x in (a, b)]
    only_rows = width(paired.difference_draws(rows_of_a, rows_of_b, (fixed, fixed)))
    only_seeds = width(paired.difference_draws(*still, seeds))
    both = width(paired.difference_draws(rows_of_a, rows_of_b, seeds))
    assert both > max(only_rows, only_seeds) > 0
    # runs that share their seeds are drawn together
    same = paired.draw_seeds(5, 5, True, 500, [0])
    assert np.array_equal(*same) and not np.array_equal(*seeds)


def test_the_test_over_seeds_is_scipys():
    a, b = [0.61, 0.64, 0.60], [0.66, 0.67, 0.64]
    assert paired.seeds_test(a, b, True)["p"] == pytest.approx(stats.ttest_rel(b, a).pvalue)
    assert paired.seeds_test(a, b, False)["p"] == pytest.approx(stats.ttest_ind(b, a, equal_var=False).pvalue)
    assert paired.seeds_test([0.5], b, False) is None


def test_seeds_that_all_gain_the_same_are_no_certainty():
    same = paired.seeds_test([0.5, 0.6], [0.6, 0.7], True)
    assert same["test"] == "Welch t over seeds"
    # t = 0.1 / sqrt(2 * 0.005 / 2) = sqrt(2) with 2 degrees of freedom: p = 1 - t / sqrt(2 + t^2)
    assert same["p"] == pytest.approx(1 - np.sqrt(2) / 2)
    assert paired.seeds_test([0.5, 0.6], [0.5, 0.6], True)["p"] == 1.0
    for b in ([0.5, 0.5], [0.6, 0.6]):  # no run differs from another of its arm
        assert paired.seeds_test([0.5, 0.5], b, True) is None and paired.seeds_test([0.5, 0.5], b, False) is None


def found(difference, low, high, p, metric="accuracy", rows=100):
    return {
        "metric": metric,
        "arms": ["A", "B"],
        "difference": difference,
        "low": low,
        "high": high,
        "p": p,
        "test": "t",
        "rows": rows,
    }


def test_the_rule():
    family = [
        found(0.02, 0.01, 0.03, 0.001),
        found(-0.02, -0.03, -0.01, 0.002),
        found(-1.5, -2, -1, 0.003, "perplexity"),
        found(0.01, -0.01, 0.03, 0.3),
        found(0.01, 0.001, 0.02, 0.04),  # alone it would do
        found(None, None, None, None),
        found(0.5, None, None, None, rows=5),
    ]
    decide(family, 0.95)
    verdicts = ["B is better", "A is better", "B is better", NOT_DISTINGUISHABLE, NOT_DISTINGUISHABLE]
    verdicts += ["undefined", "too few rows to tell"]
    assert [each["verdict"] for each in family] == verdicts
    assert (
        family[4]["p_corrected"] == pytest.approx(0.08)
        and "0.040, corrected for 5 tests is 0.080" in family[4]["because"]
    )
    assert family[3]["because"] is None and family[5]["p_corrected"] is None
    alone = [found(0.01, 0.001, 0.02, 0.04)]
    decide(alone, 0.95)
    assert alone[0]["verdict"] == "B is better"


def test_the_rule_names_every_family_and_limit():
    said = rule(0.95)
    for word in ("primary metrics", "other metrics", "macro average", "Fewer than 6 rows", "2^(1 - n)"):
        assert word in said
