"""From records to metrics: every metric through `score_records`, against its library or worked by hand; no network."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from curvelora_eval.evaluator import describe_interval
from curvelora_eval.scoring import FEWEST_ROWS, Score, score_records, statistic

pytestmark = pytest.mark.usefixtures("offline")


def records_of(predictions, references, **more):
    rows = zip(predictions, references, strict=True)
    return [
        {"row": i, "prediction": p, "reference": r} | {k: v[i] for k, v in more.items()}
        for i, (p, r) in enumerate(rows)
    ]


def value(records, *scores, key=None):
    found = score_records(records, scores, resamples=10)
    return found[key or next(iter(found))]["value"]


def test_all_metrics_come_first_score_first_and_under_their_own_names():
    records = records_of([1, 0, 1, 1], [1, 0, 0, 1], prediction_norm=[1, 0, 0, 0])
    scores = [
        Score("accuracy", "prediction_norm", keys={"accuracy": "accuracy_norm"}),
        Score("accuracy"),
        Score("matthews"),
    ]
    found = score_records(records * 2, scores, resamples=50)
    assert list(found) == ["accuracy_norm", "accuracy", "matthews"]
    assert found["accuracy_norm"]["value"] == found["accuracy"]["value"] == 0.75
    # TP 2, TN 1, FP 1, FN 0
    assert found["matthews"]["value"] == pytest.approx(2 / math.sqrt(3 * 2 * 1 * 2))
    assert all(each["low"] <= each["value"] <= each["high"] for each in found.values())


def test_scores_agree_with_scikit_learn_and_scipy():
    from scipy.stats import pearsonr, spearmanr
    from sklearn.metrics import f1_score, matthews_corrcoef

    rng = np.random.default_rng(5)
    wanted = rng.integers(0, 3, 90)
    given = np.where(rng.random(90) < 0.7, wanted, rng.integers(0, 3, 90))
    records = records_of(given.tolist(), wanted.tolist())
    options = {"labels": [0, 1, 2]}
    found = score_records(
        records, [Score("f1", options=options), Score("matthews"), Score("label_accuracy")], resamples=10
    )
    assert found["f1"]["value"] == pytest.approx(f1_score(wanted, given, average="macro"), abs=1e-12)
    assert found["matthews"]["value"] == pytest.approx(matthews_corrcoef(wanted, given), abs=1e-12)
    assert found["accuracy"]["value"] == np.mean(wanted == given)

    x, y = rng.normal(size=(2, 60))
    found = score_records(records_of(x.tolist(), y.tolist()), [Score("pearson_spearman")], resamples=10)
    assert found["pearson"]["value"] == pytest.approx(pearsonr(x, y).statistic, abs=1e-12)
    assert found["spearman"]["value"] == pytest.approx(spearmanr(x, y).statistic, abs=1e-12)


def test_perplexity_weighs_records_by_their_tokens():
    # 3 nats over 3 tokens and 1 nat over 5: exp(4 / 8), not the mean of exp(1) and exp(1 / 5)
    records = [{"row": 0, "nll": 3.0, "tokens": 3}, {"row": 1, "nll": 1.0, "tokens": 5}]
    found = score_records(records * 3, [Score("perplexity")], resamples=200)["perplexity"]
    assert found["value"] == pytest.approx(math.exp(0.5))
    assert math.exp(0.2) <= found["low"] < found["value"] < found["high"] <= math.e


@pytest.mark.parametrize("n", [1, FEWEST_ROWS - 1])
def test_a_few_rows_have_a_value_and_no_interval(n):
    found = score_records([{"nll": 1.0, "tokens": 2}] * n, [Score("perplexity")])["perplexity"]
    assert (found["value"], found["low"], found["high"]) == (pytest.approx(math.exp(0.5)), None, None)
    assert f"{n} row" in found["reason"] and str(FEWEST_ROWS) in found["reason"]
    assert found["reason"] in describe_interval(found)
    enough = score_records([{"nll": 1.0, "tokens": 2}] * FEWEST_ROWS, [Score("perplexity")])["perplexity"]
    assert enough["low"] is not None and "reason" not in enough


def test_why_a_metric_of_a_few_rows_is_undefined_stays():
    found = score_records(records_of([1.0, 1.0], [1.0, 2.0]), [Score("pearson_spearman")], resamples=5)["pearson"]
    assert found["value"] is None and "interval" not in found["reason"]


@pytest.mark.parametrize(("nll", "reason"), [(None, "1 of 2 records have no finite loss"), (1e5, "beyond the largest")])
def test_a_perplexity_that_is_no_number_says_why(nll, reason):
    records = [{"row": 0, "nll": nll, "tokens": 1}, {"row": 1, "nll": 1.0, "tokens": 1}]
    found = score_records(records, [Score("perplexity")], resamples=10)
    assert found["perplexity"]["value"] is None and reason in found["perplexity"]["reason"]
    json.dumps(found, allow_nan=False)


@pytest.mark.parametrize(
    ("score", "predictions", "references", "expected"),
    [
        (Score("accuracy"), [None, 0], [0, 0], 0.5),
        (Score("label_accuracy"), [None, "a"], ["a", "a"], 0.5),
        (Score("numeric_accuracy", options={"tolerance": 1e-3}), [None, 7.0], [0.0, 7.0], 0.5),
        (Score("exact_match"), [None, "a"], ["a", "a"], 0.5),
        (Score("rouge"), [None, "a"], ["a", ["a", "a"]], 0.5),
        # class 1: TP 1, FN 1; class 0: TP 1: macro of 2/3 and 1
        (Score("f1", options={"labels": [0, 1, 2]}), [None, 1, 0], [1, 1, 0], 5 / 6),
        # binary: TP 1, FN 1, the row without a prediction is a positive that was missed
        (Score("f1", options={"labels": [0, 1]}), [None, 1, 0], [1, 1, 0], 2 / 3),
    ],
)
def test_a_row_without_a_prediction_counts_against_the_score(score, predictions, references, expected):
    assert value(records_of(predictions, references), score) == pytest.approx(expected)


def test_matthews_counts_no_prediction_as_a_class_of_its_own():
    from sklearn.metrics import matthews_corrcoef

    found = value(records_of([None, 1, 0, 1], [1, 1, 0, 0]), Score("matthews"))
    assert found == pytest.approx(matthews_corrcoef([1, 1, 0, 0], [2, 1, 0, 1]))


def test_a_correlation_without_a_prediction_is_undefined_and_says_why():
    found = score_records(records_of([None, 1.0, 2.0], [1.0, 2.0, 3.0]), [Score("pearson_spearman")], resamples=5)
    assert found["pearson"]["value"] is None and "1 of 3 predictions are not finite" in found["pearson"]["reason"]


@pytest.mark.parametrize(
    ("records", "scores", "message"),
    [
        (
            [{"prediction": 1, "reference": 1}, {"reference": 1}],
            [Score("accuracy")],
            "reads 'prediction', which record 1",
        ),
        ([{"prediction": 1, "reference": 1}], [Score("perplexity")], "reads 'nll', which record 0"),
        (
            [{"prediction": 1, "reference": 1}],
            [Score("accuracy"), Score("label_accuracy")],
            "two scores give 'accuracy'",
        ),
        ([{"prediction": 1, "reference": 1}], [Score("acuracy")], "did you mean 'accuracy'"),
        ([], [Score("accuracy")], "at least one row"),
    ],
)
def test_bad_records(records, scores, message):
    with pytest.raises(ValueError, match=message):
        score_records(records, scores, resamples=5)


def test_the_statistic_is_the_metric_on_the_chosen_rows():
    rng = np.random.default_rng(2)
    records = records_of(rng.integers(0, 2, 40).tolist(), rng.integers(0, 2, 40).tolist())
    score = Score("matthews", keys={"matthews": "mcc"})
    rows = rng.integers(0, 40, 40)
    assert statistic(records, score)(rows)["mcc"] == pytest.approx(value([records[i] for i in rows], score))


def test_the_task_kinds_score_through_the_same_function():
    """`curvelora eval --data` and the named tasks give the same numbers for the same predictions."""
    from curvelora_eval.evaluator import score_predictions, scores_of
    from curvelora_eval.spec import TaskSpec
    from curvelora_eval.tasks import Predictions, make_task

    spec = TaskSpec(kind="sequence_classification", labels=["a", "b", "c"], metrics=["accuracy", "f1"])
    task = make_task(spec)
    given, wanted = [0, 1, 2, 0, 1, 1], [0, 1, 2, 1, 1, 0]
    assert scores_of(task) == [Score("accuracy"), Score("f1", options={"labels": [0, 1, 2]})]
    found = score_predictions(task, Predictions(given, wanted))
    assert found == score_records(records_of(given, wanted), scores_of(task))

    text = make_task(TaskSpec(kind="causal_lm", columns={"text": "text"}))
    assert score_predictions(text, Predictions([3.0, 1.0], [3, 5]))["perplexity"]["value"] == pytest.approx(
        math.exp(0.5)
    )
