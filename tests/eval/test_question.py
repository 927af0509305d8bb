"""Which class of a head is which of a task's, and what a result must say about its rows and classes."""

from __future__ import annotations

from pathlib import Path

import pytest

from curvelora.errors import UserError
from curvelora_eval import benchmarks
from curvelora_eval.evaluation.arms import Arm
from curvelora_eval.evaluation.question import Question
from curvelora_eval.evaluation.result import remarks
from curvelora_eval.spec import ModelSpec, TaskSpec


@pytest.mark.parametrize(
    ("labels", "order", "known_by"),
    [
        (["equivalent", "not_equivalent"], ["equivalent", "not_equivalent"], "name"),
        (["0", "1"], ["not_equivalent", "equivalent"], "number"),
        (["1", "0"], ["equivalent", "not_equivalent"], "number"),  # as a table's label column may give them
        (None, ["not_equivalent", "equivalent"], "position"),
    ],
)
def test_which_class_is_which(labels: list[str] | None, order: list[str], known_by: str, task_data: Path) -> None:
    mrpc = benchmarks.get("mrpc")
    question = Question(mrpc, mrpc.protocol(), "default", benchmarks.load(mrpc, task_data))
    arm = Arm("a", Path("a"), None, (ModelSpec(path="m"), TaskSpec(kind="sequence_classification", labels=labels)))
    assert question.task_spec(arm).labels == order
    assert question.classes(arm) == {"order": order, "known_by": known_by}


@pytest.mark.parametrize("labels", [["a", "b", "c"], ["negative", "positive"], ["1", "2"], ["equivalent", "other"]])
def test_a_head_for_other_classes_is_refused(labels: list[str], task_data: Path) -> None:
    mrpc = benchmarks.get("mrpc")
    question = Question(mrpc, mrpc.protocol(), "default", benchmarks.load(mrpc, task_data))
    arm = Arm("a", Path("a"), None, (ModelSpec(path="m"), TaskSpec(kind="sequence_classification", labels=labels)))
    with pytest.raises(UserError) as error:
        question.task_spec(arm)
    assert f"trained for {len(labels)} classes ({', '.join(labels)}), and mrpc has 2" in str(error.value)


@pytest.mark.parametrize(
    ("known_by", "left_out", "said"),
    [
        ("name", 0, []),
        ("number", 0, ["the adapter numbers its classes: they are taken in the task's own order"]),
        ("position", 0, ["nothing names the head's classes: they are taken in the task's own order"]),
        ("name", 1, ["1 broken line of the file left out"]),
        ("name", 3, ["3 broken lines of the file left out"]),
    ],
)
def test_what_the_reader_of_a_score_must_know(known_by: str, left_out: int, said: list[str]) -> None:
    record = {
        "counts": {"rows": 9},
        "metrics": {},
        "benchmark": {"subset": None, "left_out": left_out},
        "classes": {"order": ["a", "b"], "known_by": known_by},
        "batch_independence": None,
        "protocol": {"quirks": []},
        "repaired": [],
    }
    assert remarks(record) == said


@pytest.mark.parametrize(
    ("task", "protocol", "expected"),
    [
        ("gsm8k", "metamath", ("adapter-dropout", "pad-id-0", "metamath-hundredfold")),
        ("gsm8k", "llm-adapters", ("adapter-dropout", "pad-id-0")),
        ("boolq", "loglikelihood", ("adapter-dropout",)),
    ],
)
def test_quirks_that_matter(task: str, protocol: str, expected: tuple[str, ...], task_data: Path) -> None:
    benchmark = benchmarks.get(task)
    chosen = ("adapter-dropout", "pad-id-0", "metamath-hundredfold")
    question = Question(
        benchmark, benchmark.protocol(protocol), "default", benchmarks.load(benchmark, task_data), quirks=chosen
    )
    assert question.quirks_for(Arm("a", Path("a"))) == expected
    assert question.quirks_for(Arm("baseline")) == expected[1:]
