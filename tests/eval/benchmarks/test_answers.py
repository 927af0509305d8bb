"""Answers read out of text, against cases worked out by hand from the original scripts."""

from __future__ import annotations

import pytest

from curvelora_eval import benchmarks
from curvelora_eval.benchmarks.base import Row

ROW = Row("0", {}, "1")


@pytest.mark.parametrize(
    ("task", "text", "answer"),
    [
        ("boolq", "the correct answer is true", "true"),
        ("boolq", "false, not true", "false"),
        ("boolq", "True", None),  # case counts
        ("boolq", "untrue", "true"),  # anywhere, also inside a word
        ("boolq", "", None),
        ("piqa", "solution2 or solution1", "solution2"),
        ("piqa", "solution3", None),
        ("siqa", "answer5", "answer5"),  # the original looks for five labels in every task of this kind
        ("siqa", "answer12", "answer1"),
        ("arc_easy", "Answer1 answer4", "answer4"),
        ("hellaswag", "ending5 ending3", "ending3"),
        ("winogrande", "the correct answer is option2\n\n### Instruction:", "option2"),
        (
            "winogrande",
            "hm\n\n                ### Response:\n                option1",
            None,
        ),  # a further response is not its own
        ("aqua", "The answer is (D).", "D"),
        ("aqua", "Answer: (D)", "A"),  # the original's weakness
        ("aqua", "the answer is (d)", None),
        ("aqua", "\nRationale: Daniel has (B)", "D"),
    ],
)
def test_labels(task: str, text: str, answer: str | None) -> None:
    assert benchmarks.get(task).protocol("llm-adapters").extract(text, ROW) == answer


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("The answer is 18.", 18.0),
        ("1,234,567 in all", 1234567.0),
        ("It costs $-3.50", -3.5),
        ("18 eggs in 2 boxes", 2.0),  # the last number, whatever it counts
        ("3/4", 4.0),
        ("5-3", -3.0),  # the original reads a minus sign
        ("12.", 12.0),
        ("about .5", 5.0),  # digits must come before the dot
        ("none at all", None),
        ("", None),
        ("7</s><|reserved_special_token_3|>", 3.0),  # special tokens stay in the text
        ("4\n### Response:\n9", 4.0),
        ("9" * 400, None),  # too large for a number
    ],
)
def test_the_last_number(text: str, number: float | None) -> None:
    for task in ("gsm8k", "addsub", "multiarith", "singleeq", "svamp"):
        assert benchmarks.get(task).protocol("llm-adapters").extract(text, ROW) == number


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("2 + 2 = 4\nThe answer is: 4", 4.0),
        ("The answer is: 5. No. The answer is: 6", 6.0),
        ("The answer is 4", None),  # without the colon it is not said
        ("The answer is: $1,234", 1234.0),
        ("The answer is: 1,234,567", 1234.0),  # the original's pattern knows one comma
        ("The answer is: 18.6", 19.0),
        ("The answer is: 2.5", 2.0),  # Python rounds halves to even, as the original does
        ("The answer is: 7/2", 4.0),
        ("The answer is: 7/0", 7.0),
        ("The answer is: -3 apples", -3.0),
        ("The answer is: nothing", None),
        ("The answer is: ", None),
        ("The answer is: /2", None),
        ("", None),
    ],
)
def test_the_number_after_the_sentence(text: str, number: float | None) -> None:
    assert benchmarks.get("gsm8k").protocol("metamath").extract(text, ROW) == number


def test_references_are_what_predictions_are_compared_with() -> None:
    assert benchmarks.get("gsm8k").protocol().reference(Row("0", {}, "576.0")) == 576.0
    assert benchmarks.get("boolq").protocol().reference(Row("0", {}, "true")) == "true"
    assert benchmarks.get("aqua").protocol().reference(Row("0", {}, "C")) == "C"
    three = Row("0", {"summaries": ["a", "b", "c"]}, "a")
    assert benchmarks.get("dialogsum").protocol().reference(three) == ["a", "b", "c"]
    assert benchmarks.get("samsum").protocol().reference(Row("0", {}, "a")) == "a"


def test_protocols_score_what_they_extract() -> None:
    """From extracted answers to a metric: 2 of 3 labels right, one not found."""
    from curvelora_eval.scoring import score_records

    protocol = benchmarks.get("boolq").protocol()
    texts, answers = ["it is true", "false", "maybe"], ["true", "false", "true"]
    rows = [Row(str(i), {}, answer) for i, answer in enumerate(answers)]
    records = [
        {"prediction": protocol.extract(text, row), "reference": protocol.reference(row)}
        for text, row in zip(texts, rows, strict=True)
    ]
    assert score_records(records, protocol.scores)["accuracy"]["value"] == pytest.approx(2 / 3)
