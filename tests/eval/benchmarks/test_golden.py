"""Prompts and hashes are frozen: a changed one needs a raised version, and the reader of two results must see it."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from golden_file import GOLDEN, golden

from curvelora_eval import benchmarks
from curvelora_eval.benchmarks.protocols import Wording
from curvelora_eval.benchmarks.protocols.alpaca import TEMPLATES

FROZEN = json.loads(GOLDEN.read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", benchmarks.BENCHMARKS)
def test_nothing_that_decides_a_score_has_changed(name: str) -> None:
    assert golden(benchmarks.get(name)) == FROZEN[name], (
        "raise the version of the protocol (or of the task), then write tests/data/golden/benchmarks.json again"
    )


def test_a_version_is_part_of_the_hash() -> None:
    protocol = benchmarks.get("boolq").protocol()
    assert replace(protocol, version=2).hash() != protocol.hash()


def test_templates_and_tasks_differ_in_their_hash() -> None:
    of_boolq, of_gsm8k = benchmarks.get("boolq").protocol(), benchmarks.get("gsm8k").protocol()
    assert len({of_boolq.hash("legacy"), of_boolq.hash("clean"), of_gsm8k.hash("legacy"), of_gsm8k.hash("clean")}) == 4


@pytest.mark.parametrize(
    "change",
    [
        {"num_beams": 1},
        {"max_new_tokens": 33},
        {"skip_special_tokens": False},
        {"stop": ("\n",)},
        {"labels": ("true",)},
        {"scores": ()},
        {"wordings": TEMPLATES | {"legacy": Wording(asked="{instruction}", trained="{instruction}")}},
    ],
    ids=lambda change: next(iter(change)),
)
def test_whatever_decides_a_score_is_in_the_hash(change: dict) -> None:
    protocol = benchmarks.get("boolq").protocol()
    assert replace(protocol, **change).hash() != protocol.hash()


def test_the_original_prompts_letter_for_letter() -> None:
    """Written out from the original scripts: blanks after the first line, 16 blanks, the line between the parts."""
    row = benchmarks.load(benchmarks.get("boolq"), GOLDEN.parents[1] / "benchmarks").rows[0]
    said = row.fields["instruction"]
    first = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
    i = "                "
    assert len(i) == 16
    protocol = benchmarks.get("boolq").protocol()
    assert protocol.prompt(row, "legacy") == (
        first + " \n\n" + i + "### Instruction:\n" + i + said + "\n\n" + i + "### Response:\n" + i
    )
    assert protocol.training_text(row, "legacy") == (
        first + "  \n\n" + i + "### Instruction:\n" + i + said + "\n" + i + "\n" + i + "### Response:\n" + i,
        "the correct answer is " + row.answer,
    )
    clean = first + "\n\n### Instruction:\n" + said + "\n\n### Response:\n"
    assert protocol.prompt(row, "clean") == protocol.training_text(row, "clean")[0] == clean


def test_the_metamath_prompt_letter_for_letter() -> None:
    row = benchmarks.load(benchmarks.get("gsm8k"), GOLDEN.parents[1] / "benchmarks").rows[0]
    protocol = benchmarks.get("gsm8k").protocol("metamath")
    body = (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\n" + row.fields["instruction"] + "\n\n### Response:"
    )
    assert protocol.prompt(row) == body + " Let's think step by step."
    prompt, completion = protocol.training_text(row)
    assert prompt == body
    assert completion.endswith("\nThe answer is: 18") and "<<" not in completion and "####" not in completion
    assert protocol.extract(completion, row) == 18.0


def test_braces_in_a_question_stay_as_they_are() -> None:
    row = benchmarks.load(benchmarks.get("gsm8k"), GOLDEN.parents[1] / "benchmarks").rows[0]
    odd = replace(row, fields={"instruction": "What is {instruction} of {0}?", "output": ""})
    assert "What is {instruction} of {0}?" in benchmarks.get("gsm8k").protocol().prompt(odd)
