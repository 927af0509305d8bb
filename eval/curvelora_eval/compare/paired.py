"""The statistics of a paired comparison: resampled scores, their differences, McNemar's test, seeds, many tests at once.

All of them compare two arms on the same rows. Rows are drawn once and used for every run, so what makes a row hard for
both cancels in the difference.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy import stats

from curvelora_eval.scoring import FEWEST_ROWS, Statistic


def resampled(statistic: Statistic, n_rows: int, resamples: int, seed: Sequence[int]) -> dict[str, np.ndarray]:
    """Return the scores of `resamples` draws of n_rows rows with replacement, (resamples,) a key; NaN where undefined.

    The seed decides the draws, so the same one gives every run of a task the same rows: this makes a bootstrap paired
    (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, section 8.3; for metrics of whole corpora, Koehn 2004).
    """
    rng = np.random.default_rng(seed)
    scores = [statistic(rng.integers(0, n_rows, n_rows)) for _ in range(resamples)]
    return {key: np.array([math.nan if s[key] is None else s[key] for s in scores], dtype=float) for key in scores[0]}


def draw_seeds(n_a: int, n_b: int, paired: bool, resamples: int, seed: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Draw runs with replacement: indices (resamples, n_a) and (resamples, n_b), the same ones where runs are paired."""
    rng = np.random.default_rng(seed)
    first = rng.integers(0, n_a, (resamples, n_a))
    return first, first if paired else rng.integers(0, n_b, (resamples, n_b))


def difference_draws(a: np.ndarray, b: np.ndarray, seeds: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """Return draws (resamples,) of mean score of b's runs minus mean score of a's runs.

    Args:
        a, b: resampled scores (runs, resamples) of each arm, column i on the i-th draw of rows.
        seeds: of `draw_seeds`; with one run a side this is the plain paired bootstrap over rows.

    Runs and rows are drawn independently of each other, because every run saw every row (the two-way bootstrap of Owen,
    The pigeonhole bootstrap, 2007, section 3; that training seeds belong to the noise: Bouthillier et al. 2021,
    arXiv 2103.03098). With few runs it is too narrow, which is why `seeds_test` has a say as well.
    """
    at = np.arange(a.shape[1])[:, None]
    return b[seeds[1], at].mean(axis=1) - a[seeds[0], at].mean(axis=1)


def summarise(draws: np.ndarray, level: float, rows: int) -> dict[str, float | int | None]:
    """Return `{"low", "high", "p"[, "dropped"]}`: the percentile interval of a difference and its two-sided p-value.

    p is the smallest 1 - level whose interval leaves 0 out, min(1, 2 (1 + min(#draws <= 0, #draws >= 0)) / (1 + #draws)):
    the percentile interval turned round, with one draw added so that it is never 0 (Davison and Hinkley, Bootstrap
    Methods and their Application, 1997, sections 4.4 and 5.2). Undefined draws are dropped and counted.

    Of few `rows` the draws are the same ones again and again: p is at least 2^(1 - rows), the probability that all of them
    favour one side by chance, and below `FEWEST_ROWS` all three are None.
    """
    kept = draws[np.isfinite(draws)]
    found: dict[str, float | int | None] = {"low": None, "high": None, "p": None}
    if len(kept) and rows >= FEWEST_ROWS:
        low, high = np.quantile(kept, [(1 - level) / 2, (1 + level) / 2]).tolist()
        tail = 1 + min(np.count_nonzero(kept <= 0), np.count_nonzero(kept >= 0))
        found = {"low": low, "high": high, "p": min(1.0, max(2 * tail / (1 + len(kept)), 2.0 ** (1 - rows)))}
    if len(kept) < len(draws):
        found["dropped"] = len(draws) - len(kept)
    return found


def mcnemar(a: np.ndarray, b: np.ndarray) -> dict[str, float | int]:
    """Return the table of rows that a and b (n,) get right (1) or wrong (0), and p of McNemar's test in its exact form.

    Of the rows on which the two disagree, each side should win half; p is the two-sided binomial one (McNemar 1947;
    Dietterich 1998 recommends it for two classifiers on one test set). Without a disagreement p is 1.
    """
    a, b = a > 0.5, b > 0.5
    only_a, only_b = int((a & ~b).sum()), int((~a & b).sum())
    p = stats.binomtest(only_a, only_a + only_b, 0.5).pvalue if only_a + only_b else 1.0
    return {
        "both_right": int((a & b).sum()),
        "only_a": only_a,
        "only_b": only_b,
        "both_wrong": int((~a & ~b).sum()),
        "p": float(p),
    }


def seeds_test(a: Sequence[float], b: Sequence[float], paired: bool) -> dict[str, float | str] | None:
    """Return `{"test", "p"}` of the mean over runs, b against a; None where nothing can be learnt from the spread over seeds:
    an arm has one run, or all runs of each arm are the same.

    Student's paired t where the runs share their seeds and their differences scatter, Welch's t otherwise: differences that
    are all the same would have a paired p of 0, from two or three seeds.
    """
    if min(len(a), len(b)) < 2:
        return None
    x, y = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        return None
    rounding = 1e-12 * max(1.0, float(np.abs([*x, *y]).max()))
    if np.std(x) + np.std(y) <= rounding:
        return None
    if paired and np.std(y - x) > rounding:
        return {"test": "paired t over seeds", "p": float(stats.ttest_rel(y, x).pvalue)}
    return {"test": "Welch t over seeds", "p": float(stats.ttest_ind(y, x, equal_var=False).pvalue)}


def holm(p_values: Sequence[float]) -> list[float]:
    """Return the p-values corrected for their number, in their order (Holm 1979): the k-th smallest times m - k + 1.

    Calling those below alpha makes one false claim or more with probability alpha at most, however the tests depend on
    each other.
    """
    order = np.argsort(p_values, kind="stable")
    corrected, highest = [1.0] * len(p_values), 0.0
    for rank, position in enumerate(order.tolist()):
        highest = max(highest, (len(p_values) - rank) * p_values[position])
        corrected[position] = min(1.0, highest)
    return corrected
