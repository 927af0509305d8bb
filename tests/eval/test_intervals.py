"""The bootstrap against the analytic binomial interval, its determinism, and what it does with undefined resamples."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from curvelora_eval import intervals
from curvelora_eval.intervals import bootstrap_interval, score


def mean_of(values):
    return lambda index: {"mean": float(values[index].mean())}


@pytest.mark.parametrize("level", [0.8, 0.95])
def test_width_agrees_with_the_binomial_interval(level):
    """At n = 400 the normal interval p ± z sqrt(p (1 - p) / n) is good; 4000 resamples come within 0.006 of it.

    A bound's own Monte-Carlo error is about 0.0009 here, and the score moves in steps of 1 / 400 = 0.0025.
    """
    hits = np.arange(400) < 300
    found = bootstrap_interval(mean_of(hits), 400, level=level, resamples=4000)["mean"]
    z = {0.8: 1.2816, 0.95: 1.9600}[level]
    half = z * math.sqrt(0.75 * 0.25 / 400)
    assert found["value"] == 0.75
    assert found["low"] == pytest.approx(0.75 - half, abs=0.006)
    assert found["high"] == pytest.approx(0.75 + half, abs=0.006)


def test_coverage_is_close_to_the_level():
    """Of 300 samples of 100 rows with p = 0.7, about 95 % of the intervals hold p.

    The percentile interval covers slightly too little at this n; 0.90 to 0.98 is the nominal 0.95 with about 2.5
    standard errors (0.013 each) on either side, and 0.02 for that bias below.
    """
    rng = np.random.default_rng(11)
    held = 0
    for trial in range(300):
        found = bootstrap_interval(mean_of(rng.random(100) < 0.7), 100, resamples=200, seed=trial)["mean"]
        held += found["low"] <= 0.7 <= found["high"]
    assert 0.90 <= held / 300 <= 0.98


def test_the_seed_decides():
    values = np.random.default_rng(0).normal(size=50)
    first, again, other = (bootstrap_interval(mean_of(values), 50, seed=seed) for seed in (4, 4, 5))
    assert first == again
    assert first["mean"]["low"] != other["mean"]["low"] and first["mean"]["value"] == other["mean"]["value"]


def test_constant_rows_have_zero_width():
    assert bootstrap_interval(mean_of(np.full(30, 2.5)), 30) == {"mean": {"value": 2.5, "low": 2.5, "high": 2.5}}


def test_undefined_resamples_are_dropped_and_counted():
    calls = iter(range(1000))

    def statistic(index):
        call = next(calls)
        return {"a": None if call % 2 else 1.0, "b": math.nan if call in (1, 2, 3) else float(call > 0)}

    found = bootstrap_interval(statistic, 10, resamples=100)
    assert found["a"] == {"value": 1.0, "low": 1.0, "high": 1.0, "dropped": 50}
    assert found["b"] == {"value": 0.0, "low": 1.0, "high": 1.0, "dropped": 3}


def test_an_undefined_value_has_no_bounds():
    found = bootstrap_interval(lambda index: {"a": math.nan, "b": None}, 3, resamples=5)
    undefined = {"value": None, "low": None, "high": None, "dropped": 5}
    assert found == {"a": undefined, "b": undefined}


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (0, {}, "at least one row"),
        (5, {"level": 95}, "level must lie between"),
        (5, {"resamples": 0}, "resamples must"),
    ],
)
def test_bad_arguments(rows, options, message):
    with pytest.raises(ValueError, match=message):
        bootstrap_interval(mean_of(np.ones(5)), rows, **options)


def test_score_takes_the_value_from_compute_and_is_deterministic():
    rng = np.random.default_rng(1)
    references = rng.integers(0, 2, 120).tolist()
    predictions = [r if rng.random() < 0.8 else 1 - r for r in references]
    names = ["accuracy", "f1", "matthews"]
    found = score(names, predictions, references, resamples=200)
    assert list(found) == names
    assert found["accuracy"]["value"] == np.mean(np.equal(predictions, references))
    assert all(entry["low"] < entry["value"] < entry["high"] for entry in found.values())
    assert found == score(names, predictions, references, resamples=200)
    assert found != score(names, predictions, references, resamples=200, seed=1)


def test_score_resamples_without_compute(monkeypatch):
    """`compute` writes an arrow table, so it may run once a metric, not once a resample."""
    calls = []

    def counted(name, load=intervals.load_metric):
        metric = load(name)
        compute = metric.compute
        metric.compute = lambda **rows: calls.append(name) or compute(**rows)
        return metric

    monkeypatch.setattr(intervals, "load_metric", counted)
    score(["accuracy"], [0, 1, 1], [0, 1, 0], resamples=20)
    score(["rouge"], ["a", "b c"], ["a", "b"], resamples=20)
    assert calls == ["accuracy", "rouge"]


def test_score_of_text_resamples_row_means():
    predictions, references = ["a b", "a b", "x", "y z"], ["a b", "a c", "x", "q"]
    found = score(["rouge", "exact_match"], predictions, references, resamples=300)
    assert list(found) == ["rouge1", "rouge2", "rougeL", "exact_match"]
    # rows 1, 0.5, 1, 0; the least and the most that a mean of four can be are 0 and 1
    assert found["rouge1"]["value"] == pytest.approx(0.625)
    assert 0 <= found["rouge1"]["low"] < 0.625 < found["rouge1"]["high"] <= 1
    assert found["exact_match"]["value"] == 0.5


def test_score_passes_options_on():
    found = score(["exact_match"], [" a"], ["a"], {"exact_match": {"normalise_whitespace": True}}, resamples=5)
    assert found["exact_match"] == {"value": 1.0, "low": 1.0, "high": 1.0}


def test_f1_stays_macro_in_a_resample_that_misses_a_class():
    """A third of the resamples miss the one row of class 2. Binary F1 of class 1, which is never right, would be 0."""
    predictions, references = [0] * 7 + [2], [0] * 6 + [1, 2]
    found = score(["f1"], predictions, references, resamples=200)
    assert found["f1"]["value"] == pytest.approx((12 / 13 + 0 + 1) / 3)
    assert found["f1"]["low"] > 0.2


def test_constant_predictions_score_as_none_with_a_reason():
    found = score(["pearson_spearman"], [1.0, 1.0, 1.0], [1.0, 2.0, 3.0], resamples=10)
    assert found["pearson"]["value"] is None and found["spearman"]["low"] is None
    assert "predictions are constant" in found["pearson"]["reason"] and found["pearson"]["dropped"] == 10
    json.dumps(found, allow_nan=False)


def test_constant_resamples_are_dropped():
    # A resample of three rows is one row three times with probability 1/9.
    found = score(["pearson_spearman"], [1.0, 2.0, 3.0], [1.0, 2.0, 3.0], resamples=200)
    assert found["pearson"]["value"] == pytest.approx(1.0)
    assert 5 <= found["pearson"]["dropped"] <= 45
