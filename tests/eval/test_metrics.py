"""Each metric against the library called directly, against cases worked by hand and on degenerate input; no network."""

from __future__ import annotations

import json
import socket
import subprocess
import sys

import numpy as np
import pytest

from curvelora_eval.metrics import KEYS, METRICS, load_metric

RNG = np.random.default_rng(3)
CLASSES = {"predictions": RNG.integers(0, 4, 200).tolist(), "references": RNG.integers(0, 4, 200).tolist()}
BINARY = {"predictions": RNG.integers(0, 2, 200).tolist(), "references": RNG.integers(0, 2, 200).tolist()}
NUMBERS = {"predictions": RNG.normal(size=200).tolist(), "references": RNG.normal(size=200).tolist()}
TEXTS = {
    "predictions": ["the cat sat on the mat", "dogs running fast", "Nothing in common"],
    "references": ["the cat is on the mat", "a dog runs fast", "entirely different words"],
}
VALID = {
    "accuracy": CLASSES,
    "exact_match": TEXTS,
    "f1": CLASSES,
    "label_accuracy": {k: [f"answer{i}" for i in v] for k, v in CLASSES.items()},
    "matthews": CLASSES,
    "numeric_accuracy": NUMBERS,
    "pearson_spearman": NUMBERS,
    "rouge": TEXTS,
}


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a metric opened a socket")

    monkeypatch.setattr(socket, "socket", refuse)


def compute(name, predictions, references, **options):
    return load_metric(name).compute(predictions=predictions, references=references, **options)


@pytest.mark.parametrize("name", METRICS)
def test_every_metric_gives_its_keys_and_plain_numbers(name):
    result = compute(name, **VALID[name])
    assert tuple(result) == KEYS[name]
    assert all(type(value) is float for value in result.values())


def test_accuracy():
    assert compute("accuracy", [0, 1, 2, 2], [0, 1, 1, 2]) == {"accuracy": 0.75}
    from sklearn.metrics import accuracy_score

    expected = accuracy_score(CLASSES["references"], CLASSES["predictions"])
    assert compute("accuracy", **CLASSES)["accuracy"] == expected


def test_f1_is_binary_for_labels_0_and_1():
    # TP 1, FP 1, FN 2: 2 / (2 + 1 + 2)
    assert compute("f1", [1, 1, 0, 0, 0], [1, 0, 1, 1, 0]) == {"f1": pytest.approx(0.4)}
    from sklearn.metrics import f1_score

    assert compute("f1", **BINARY)["f1"] == f1_score(BINARY["references"], BINARY["predictions"], average="binary")


def test_f1_is_macro_otherwise():
    # class 0: 2 / (2 + 0 + 0) = 1; class 1: 2 / (2 + 1 + 0) = 2/3; class 2: 0 / (0 + 0 + 1) = 0
    assert compute("f1", [0, 1, 1], [0, 1, 2]) == {"f1": pytest.approx(5 / 9)}
    from sklearn.metrics import f1_score

    assert compute("f1", **CLASSES)["f1"] == f1_score(CLASSES["references"], CLASSES["predictions"], average="macro")


def test_f1_declared_labels_decide():
    rows = {"predictions": [1, 1, 0, 0, 0], "references": [1, 0, 1, 1, 0]}
    # macro over {0, 1, 2}: class 2 occurs nowhere and is left out; class 0 has TP 1, FP 2, FN 1, so 2/5, as class 1
    assert compute("f1", **rows, labels=[0, 1, 2]) == {"f1": pytest.approx(0.4)}
    assert compute("f1", [0, 1], [0, 0], labels=[0, 1]) == {"f1": 0.0}
    # labels {1, 2} are two classes but not {0, 1}: macro of 1 and 1
    assert compute("f1", [1, 2], [1, 2]) == {"f1": 1.0}


def test_f1_without_a_positive_is_none_with_a_reason():
    result = compute("f1", [0, 0], [0, 0], labels=[0, 1])
    assert result["f1"] is None and "no positive row" in result["reason"]


def test_matthews():
    # TP 1, TN 1, FP 1, FN 2: (1 - 2) / sqrt(2 * 3 * 2 * 3)
    assert compute("matthews", [1, 1, 0, 0, 0], [1, 0, 1, 1, 0]) == {"matthews": pytest.approx(-1 / 6)}
    from sklearn.metrics import matthews_corrcoef

    expected = matthews_corrcoef(CLASSES["references"], CLASSES["predictions"])
    assert compute("matthews", **CLASSES)["matthews"] == expected


@pytest.mark.parametrize("predictions", [[0, 0, 0], [1, 1, 1]])
@pytest.mark.filterwarnings("error")
def test_matthews_of_one_class_is_zero(predictions):
    assert compute("matthews", predictions, [0, 0, 0]) == {"matthews": 0.0}
    assert compute("matthews", predictions, [0, 1, 0]) == {"matthews": 0.0}


def test_pearson_and_spearman():
    # deviations (-1.5, -.5, .5, 1.5) and (-1, -2, 1, 2): r = 6 / sqrt(5 * 10)
    # ranks 1 2 3 4 and 2 1 3 4: rho = 1 - 6 * 2 / 60
    result = compute("pearson_spearman", [1, 2, 3, 4], [2, 1, 4, 5])
    assert result == {"pearson": pytest.approx(6 / 50**0.5), "spearman": pytest.approx(0.8)}
    from scipy.stats import pearsonr, spearmanr

    result = compute("pearson_spearman", **NUMBERS)
    assert result["pearson"] == pearsonr(NUMBERS["predictions"], NUMBERS["references"]).statistic
    assert result["spearman"] == spearmanr(NUMBERS["predictions"], NUMBERS["references"]).statistic


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("predictions", "references", "reason"),
    [
        ([0.1, 0.1, 0.1], [1, 2, 3], "the predictions are constant"),
        ([1, 2, 3], [5, 5, 5], "the references are constant"),
        ([1, float("nan"), float("inf")], [1, 2, 3], "2 of 3 predictions are not finite"),
        ([1], [2], "at least two rows"),
    ],
)
def test_undefined_correlation_is_none_with_a_reason(predictions, references, reason):
    result = compute("pearson_spearman", predictions, references)
    assert result["pearson"] is None and result["spearman"] is None and reason in result["reason"]
    json.dumps(result, allow_nan=False)


def test_rouge():
    # unigrams: 3 of 3 predicted, 3 of 4 wanted; bigrams: 1 of 2 and 1 of 3; longest subsequence "the cat sat": 3
    result = compute("rouge", ["the cat sat"], ["the cat quietly sat"])
    assert result == {"rouge1": pytest.approx(6 / 7), "rouge2": pytest.approx(0.4), "rougeL": pytest.approx(6 / 7)}


@pytest.mark.parametrize("use_stemmer", [False, True])
def test_rouge_is_the_mean_of_rouge_score(use_stemmer):
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=use_stemmer)
    rows = [scorer.score(r, p) for p, r in zip(TEXTS["predictions"], TEXTS["references"], strict=True)]
    expected = {key: pytest.approx(sum(row[key].fmeasure for row in rows) / 3) for key in KEYS["rouge"]}
    assert compute("rouge", **TEXTS, use_stemmer=use_stemmer) == expected


def test_rouge_stemmer_joins_word_forms():
    assert compute("rouge", ["dogs running"], ["dog runs"])["rouge1"] == 0.0
    assert compute("rouge", ["dogs running"], ["dog runs"], use_stemmer=True)["rouge1"] == 1.0


def test_exact_match():
    predictions, references = ["yes", " a  b\n", "No", ""], ["yes", "a b", "no", ""]
    assert compute("exact_match", predictions, references) == {"exact_match": 0.5}
    assert compute("exact_match", predictions, references, normalise_whitespace=True) == {"exact_match": 0.75}


def test_rouge_over_several_references_is_the_mean_or_the_best():
    """The mean is that of scoring against each reference in turn; the best is rouge_score's own for several."""
    from rouge_score.rouge_scorer import RougeScorer

    predictions = ["the cat sat", "a dog runs fast today"]
    references = [["the cat quietly sat", "a cat", "sat the cat"], ["dogs run", "the dog runs fast", "a dog runs"]]
    each = [compute("rouge", predictions, [row[i] for row in references]) for i in range(3)]
    expected = {key: pytest.approx(np.mean([result[key] for result in each])) for key in KEYS["rouge"]}
    assert compute("rouge", predictions, references) == expected

    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"])
    best = [scorer.score_multi(targets, text) for targets, text in zip(references, predictions, strict=True)]
    expected = {key: pytest.approx(np.mean([row[key].fmeasure for row in best])) for key in KEYS["rouge"]}
    found = compute("rouge", predictions, references, over_references="max")
    assert found == expected and found["rouge1"] > compute("rouge", predictions, references)["rouge1"]


def test_rouge_takes_one_reference_and_several_in_one_call():
    assert compute("rouge", ["a b", "a"], ["a b", ["a", "b"]])["rouge1"] == pytest.approx(0.75)
    with pytest.raises(ValueError, match="row 1 has none"):
        compute("rouge", ["a b", "a"], ["a b", []])
    with pytest.raises(ValueError, match="over_references must be one of mean, max, found 'best'"):
        compute("rouge", ["a"], ["a"], over_references="best")


def test_label_accuracy():
    from sklearn.metrics import accuracy_score

    # an answer that was not found is wrong, and case counts
    assert (
        compute("label_accuracy", [None, "true", "True", "false"], ["true", "true", "true", "false"])["accuracy"] == 0.5
    )
    assert compute("label_accuracy", [None, None], ["true", "false"]) == {"accuracy": 0.0}
    assert compute("label_accuracy", [0, None, 2], [0, 1, 2])["accuracy"] == pytest.approx(2 / 3)
    rows = VALID["label_accuracy"]
    assert compute("label_accuracy", **rows)["accuracy"] == accuracy_score(rows["references"], rows["predictions"])
    with pytest.raises(ValueError, match="row 1 has none"):
        compute("label_accuracy", ["a", "a"], ["a", None])


def test_numeric_accuracy():
    # no number, NaN and infinity are wrong; commas stand between thousands
    given = [None, float("nan"), float("inf"), "1,234", 1234.0, "1,234,567.5", "-3", "many", ""]
    wanted = [0, 0, 5, 1234, "1,234", 1234567.5, -3.0, 7, 0]
    assert compute("numeric_accuracy", given, wanted)["accuracy"] == pytest.approx(4 / 9)


@pytest.mark.parametrize(
    ("given", "wanted", "right"),
    [
        (1e-3, 0, True),  # the tolerance itself is within
        (-1e-3, 0, True),
        (np.nextafter(1e-3, 1), 0, False),
        (1.001, 1, True),  # in floating point 1.001 - 1 is just below 0.001 and 5.001 - 5 just above
        (5.001, 5, False),
        (5.0009, 5, True),
        (4.998, 5, False),
    ],
)
def test_numeric_accuracy_at_its_tolerance(given, wanted, right):
    assert compute("numeric_accuracy", [given], [wanted])["accuracy"] == right == (abs(wanted - given) <= 1e-3)


def test_numeric_accuracy_with_bad_input():
    assert compute("numeric_accuracy", [1.5], [1], tolerance=0.5) == {"accuracy": 1.0}
    with pytest.raises(ValueError, match="tolerance of at least 0, found -1"):
        compute("numeric_accuracy", [1], [1], tolerance=-1)
    for reference in (None, float("nan"), "many"):
        with pytest.raises(ValueError, match="finite reference for every row; row 1 has"):
            compute("numeric_accuracy", [1, 2], [1, reference])


@pytest.mark.parametrize("name", METRICS)
def test_empty_input_is_a_clear_error(name):
    with pytest.raises(ValueError, match=f"{name} needs at least one row"):
        compute(name, [], [])


@pytest.mark.parametrize("name", METRICS)
def test_sides_of_unequal_length_are_an_error(name):
    rows = VALID[name]
    with pytest.raises(ValueError, match=r"Mismatch in the number of predictions"):
        compute(name, rows["predictions"][:-1], rows["references"])


def test_unknown_metric_names_the_nearest_and_the_list():
    with pytest.raises(ValueError, match=r"unknown metric 'acuracy'; did you mean 'accuracy'.*: accuracy, exact"):
        load_metric("acuracy")
    with pytest.raises(ValueError, match=r"unknown metric 'zzz'; known metrics"):
        load_metric("zzz")


def test_importing_the_package_loads_no_heavy_library():
    code = (
        "import sys; before = set(sys.modules); import curvelora_eval.metrics\n"
        "heavy = {'evaluate', 'datasets', 'sklearn', 'scipy', 'torch', 'rouge_score'}\n"
        "print('loaded:', sorted(heavy & (set(sys.modules) - before)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "loaded: []\n", done.stderr


@pytest.mark.parametrize("name", ["f1", "matthews"])
@pytest.mark.parametrize("classes", [2, 3, 5])
def test_counts_give_what_scikit_learn_gives(name: str, classes: int) -> None:
    """The bootstrap works on class counts; each resample must equal the metric itself."""
    from curvelora_eval.intervals import resampler

    rng = np.random.default_rng(classes)
    predictions, references = rng.integers(0, classes, (2, 60)).tolist()
    settings = {"labels": list(range(classes))} if name == "f1" else {}
    metric = load_metric(name)
    statistic = resampler(metric, predictions, references, settings)
    for rows in (np.arange(60), rng.integers(0, 60, 60), np.array([0, 0, 1]), np.array([3] * 4)):
        wanted = metric._compute(np.array(predictions)[rows], np.array(references)[rows], **settings)[name]
        found = statistic(rows)[name]
        assert (wanted is None and np.isnan(found)) or found == pytest.approx(wanted, abs=1e-12)


def test_matthews_of_many_rows_does_not_overflow() -> None:
    """The fourth power of 150,000 rows is beyond 64-bit integers."""
    from curvelora_eval.intervals import score

    references = np.tile([0, 1], 75_000)
    predictions = np.where(np.arange(150_000) % 5 == 0, 1 - references, references)
    scored = score(["matthews"], predictions, references, resamples=20)["matthews"]
    assert scored["value"] == pytest.approx(0.6, abs=1e-6)
    assert scored["low"] < 0.6 < scored["high"] < 0.61
    assert "dropped" not in scored
