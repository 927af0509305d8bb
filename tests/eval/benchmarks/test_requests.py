"""LLM-Adapters' instructions, written from parts and read back; and what loglikelihood makes of the parts."""

from __future__ import annotations

from pathlib import Path

import pytest

from curvelora.errors import UserError
from curvelora_eval import benchmarks
from curvelora_eval.benchmarks import arc, boolq, hellaswag, openbookqa, piqa, siqa, winogrande
from curvelora_eval.benchmarks.base import Row

REQUESTS = {
    "boolq": boolq.REQUEST,
    "piqa": piqa.REQUEST,
    "siqa": siqa.REQUEST,
    "hellaswag": hellaswag.REQUEST,
    "winogrande": winogrande.REQUEST,
    "arc_easy": arc.REQUEST,
    "arc_challenge": arc.REQUEST,
    "openbookqa": openbookqa.REQUEST,
}


@pytest.mark.parametrize("task", REQUESTS)
def test_instructions_are_read_and_written_again(task: str, samples: Path) -> None:
    for row in benchmarks.load(benchmarks.get(task), samples).rows:
        question, options = REQUESTS[task].read(row.fields["instruction"])
        assert question and all(option.strip() for option in options)
        assert REQUESTS[task].write(question, options) == row.fields["instruction"]
        assert (question, options) == (row.fields["question"], row.fields["options"])


def test_arc_has_three_to_five_options(samples: Path) -> None:
    counts = {len(row.fields["options"]) for row in benchmarks.load(benchmarks.get("arc_challenge"), samples).rows}
    assert counts == {3, 4, 5}


def test_what_is_not_of_the_form_is_not_guessed() -> None:
    opening = arc.REQUEST.opening
    for text in (
        "Which is larger?",
        f"{opening}Which?\n\nAnswer1: a Answer2: b",
        f"{opening}Which?\n\nAnswer1: a Answer2: b\n\nAnswer format: answer1/answer2/answer3",
        f"{opening}Which?\n\nAnswer1: a Answer2: b\n\nAnswer format: answer2/answer1",
        f"{opening}Which? Answer1: a Answer2: b\n\nAnswer format: answer1/answer2",
    ):
        assert arc.REQUEST.read(text) is None
    assert boolq.REQUEST.read(f"{boolq.REQUEST.opening}is it?\nAnswer format: true/false") is None


PAIRS = {
    "boolq": [
        ("Question: is a lighthouse lamp always lit by electricity?\nAnswer:", " no"),
        ("Question: is a lighthouse lamp always lit by electricity?\nAnswer:", " yes"),
    ],
    "winogrande": [
        ("Sarah was a much better surgeon than Maria so Sarah", " always got the easier cases."),
        ("Sarah was a much better surgeon than Maria so Maria", " always got the easier cases."),
    ],
    "openbookqa": [
        (
            "A person wants to start saving money so that they can afford a nice vacation at the end of the year. After looking "
            "over their budget and expenses, they decide the best way to save money is to",
            f" {option}",
        )
        for option in (
            "make more phone calls",
            "quit eating lunch out",
            "buy less with monopoly money",
            "have lunch with friends",
        )
    ],
    "siqa": [
        (
            "Q: Tracy didn't go home that evening and resisted Riley's attacks. What does Tracy need to do before this?\nA:",
            f" {o}",
        )
        for o in ("make a new plan", "Go home and see Riley", "Find somewhere to go")
    ],
}


@pytest.mark.parametrize("task", PAIRS)
def test_pairs_are_those_of_the_harness(task: str, samples: Path) -> None:
    benchmark = benchmarks.get(task)
    protocol = benchmark.protocol("loglikelihood")
    row = benchmarks.load(benchmark, samples).rows[0]
    assert protocol.pairs(row) == PAIRS[task]
    assert protocol.lengths(row) == [len(continuation.strip()) for _, continuation in PAIRS[task]]
    right = {"boolq": 0, "winogrande": 1, "openbookqa": 1, "siqa": 2}[task]
    assert protocol.reference(row) == right


@pytest.mark.parametrize("task", REQUESTS)
def test_only_what_the_harness_normalises_is_normalised(task: str) -> None:
    scores = benchmarks.get(task).protocol("loglikelihood").scores
    keys = [key for score in scores for key in score.results.values()]
    normalised = task in ("piqa", "hellaswag", "arc_easy", "arc_challenge", "openbookqa")
    assert keys == (["accuracy", "accuracy_norm"] if normalised else ["accuracy"])


def test_rows_that_loglikelihood_cannot_read_are_said_before_any_model_is_loaded() -> None:
    protocol = benchmarks.get("winogrande").protocol("loglikelihood")
    fields = {"question": "He said so.", "options": ("He", "She")}
    for row, reason in (
        (Row("test-3", {"question": None, "options": None}, "option1"), "cannot be told apart"),
        (Row("test-3", fields, "option1"), "has no '_' in its sentence"),
        (Row("test-3", fields | {"options": ("He",)}, "option2"), "only 1 options"),
        (Row("test-3", fields | {"question": "So said _ "}, "option1"), "nothing after the '_' of its sentence"),
    ):
        with pytest.raises(UserError, match=reason) as error:
            protocol.check([row])
        assert "1 of 1 rows" in str(error.value) and "test-3" in str(error.value)
    protocol.check([Row("0", fields | {"question": "_ said so."}, "option1")])
    for task in ("piqa", "hellaswag"):  # a choice without text has no length to divide by
        protocol = benchmarks.get(task).protocol("loglikelihood")
        row = Row("test-3", {"question": "How?", "options": ("go", " ", "a", "b")}, protocol.answers[0])
        with pytest.raises(UserError, match="an option without text, so there is nothing to score"):
            protocol.check([row])


def test_hellaswag_keeps_its_marks_in_the_prompt_and_loses_them_for_scoring() -> None:
    row = hellaswag.from_hub(
        {
            "activity_label": "Travel",
            "ctx": "[header] How to pack [title] Begin early. [step] then",
            "ctx_a": "[header] How to pack [title] Begin early. [step]",
            "ctx_b": "then",
            "endings": ["go. [title] Rest", "[substeps] stay", "sing", "sleep"],
            "label": "1",
        },
        "test-0",
    )
    assert row.fields["instruction"].startswith(
        "Please choose the correct ending to complete the given sentence: Travel: [header] How to pack [title] Begin early. "
        "[step] then\n\nEnding1: go. [title] Rest Ending2: [substeps] stay Ending3: sing"
    )
    assert row.answer == "ending2"
    pairs = benchmarks.get("hellaswag").protocol("loglikelihood").pairs(row)
    # the harness's replacements, done by hand: its full stop for " [title]", two blanks become one
    assert pairs[0] == ("Travel: How to pack. Begin early. Then", " go.. Rest")
    assert pairs[1][1] == "  stay" and benchmarks.get("hellaswag").protocol("loglikelihood").lengths(row)[1] == len(
        " stay"
    )


def test_hellaswag_s_text_form_and_its_faults(tmp_path: Path) -> None:
    folder = tmp_path / "hellaswag"
    folder.mkdir()
    file = folder / "hellaswag_val_full.txt"
    file.write_text("A man sits. he\n2\na\nb\nc\nd\n")
    row = benchmarks.load(benchmarks.get("hellaswag"), tmp_path).rows[0]
    assert (row.id, row.answer, row.fields["options"]) == ("test-0", "ending3", ("a", "b", "c", "d"))
    file.write_text("A man sits. he\n2\na\nb\nc\n")
    with pytest.raises(UserError, match="5 lines, and a question has 6"):
        benchmarks.load(benchmarks.get("hellaswag"), tmp_path)
    file.write_text("A man sits. he\n4\na\nb\nc\nd\n")
    with pytest.raises(UserError, match="line 2 should be the index"):
        benchmarks.load(benchmarks.get("hellaswag"), tmp_path)
