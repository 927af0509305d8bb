"""GLUE's files as they are: quotation marks, carriage returns, a byte-order mark, missing headers, surplus fields."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from curvelora.cli import run_module
from curvelora.errors import UserError
from curvelora_eval import benchmarks, tasks_command
from curvelora_eval.benchmarks.protocols import HeadProtocol
from curvelora_eval.scoring import score_records

TASKS = ("sst2", "mrpc", "cola", "qnli", "rte", "stsb", "qqp", "mnli")


def test_quotation_marks_are_text(samples: Path) -> None:
    row = benchmarks.load(benchmarks.get("mrpc"), samples).rows[1]
    assert row.fields["text"] == 'The company sold " most of its ships " last year .' and row.answer == "equivalent"


def test_lines_end_with_a_carriage_return_or_not(samples: Path) -> None:
    rows = benchmarks.load(benchmarks.get("sst2"), samples, "test").rows
    assert {row.answer for row in rows} <= {"negative", "positive"}  # and not "1\r"


def test_cola_has_a_header_only_where_it_has_no_labels(samples: Path) -> None:
    labelled = benchmarks.load(benchmarks.get("cola"), samples).rows
    unlabelled = benchmarks.load(benchmarks.get("cola"), samples, "test").rows
    assert labelled[0].fields["text"] == unlabelled[0].fields["text"] == "The sailors mended the net before dawn."
    assert [labelled[0].answer, labelled[1].answer] == ["acceptable", "unacceptable"]


def test_stsb_s_original_test_file_has_no_header_and_lines_with_more_fields(samples: Path) -> None:
    rows = benchmarks.load(benchmarks.get("stsb"), samples, "test").rows
    assert len(rows) == 12 and rows[3].fields["text_pair"] == "The bridge was closed for repairs on Monday ."
    assert benchmarks.get("stsb").protocol().reference(rows[3]) == 1.8


def test_ids_are_the_source_s_own_where_it_has_some(tmp_path: Path) -> None:
    (tmp_path / "rte").mkdir()
    (tmp_path / "rte/dev.tsv").write_text("index\tsentence1\tsentence2\tlabel\n17\ta\tb\tentailment\n")
    assert benchmarks.load(benchmarks.get("rte"), tmp_path).rows[0].id == "validation-17"


@pytest.fixture
def qqp(tmp_path: Path) -> Callable[[int, int], Path]:
    """`qqp(good, broken)`: a folder with a file of so many lines."""

    def write(good: int, broken: int) -> Path:
        lines = ["id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate"]
        lines += [f"{i}\t{i}\t{i}\ta?\tb?\t{i % 2}" for i in range(good)] + ["7\t1\t2\tcut off"] * broken
        (tmp_path / "QQP").mkdir(exist_ok=True)
        (tmp_path / "QQP/dev.tsv").write_text("\n".join(lines) + "\n")
        return tmp_path

    return write


def test_qqp_leaves_out_the_lines_that_are_cut_off_and_counts_them(
    qqp: Callable[[int, int], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    loaded = benchmarks.load(benchmarks.get("qqp"), qqp(2, 1))
    assert [row.answer for row in loaded.rows] == ["not_duplicate", "duplicate"] and loaded.left_out == 1
    assert benchmarks.load(benchmarks.get("qqp"), qqp(4000, 4), limit=3).left_out == 4
    assert benchmarks.load(benchmarks.get("qqp"), qqp(2, 0)).left_out == 0
    folder = qqp(2000, 2)
    assert run_module(tasks_command, "curvelora tasks", ["qqp", "--data-dir", str(folder)]) == 0
    assert "broken lines left out: 2" in capsys.readouterr().out


@pytest.mark.parametrize(("good", "broken"), [(2, 2), (1900, 2), (0, 3)])
def test_a_qqp_file_with_many_broken_lines_is_another_file(
    good: int, broken: int, qqp: Callable[[int, int], Path]
) -> None:
    with pytest.raises(UserError, match=f"{broken} of {good + broken} lines have not 6 fields"):
        benchmarks.load(benchmarks.get("qqp"), qqp(good, broken))


METRICS = {
    "sst2": ["accuracy"],
    "mrpc": ["accuracy", "f1"],
    "cola": ["matthews"],
    "qnli": ["accuracy"],
    "rte": ["accuracy"],
    "stsb": ["pearson", "spearman"],
    "qqp": ["accuracy", "f1"],
    "mnli": ["accuracy"],
}


@pytest.mark.parametrize("task", TASKS)
def test_each_task_has_glue_s_own_metrics(task: str, samples: Path) -> None:
    """Scored against itself, every metric is at its best, and they are the ones that GLUE names."""
    protocol = benchmarks.get(task).protocol()
    rows = benchmarks.load(benchmarks.get(task), samples).rows
    records = [{"prediction": protocol.reference(row), "reference": protocol.reference(row)} for row in rows]
    scored = score_records(records, protocol.scores, resamples=20)
    assert {key: value["value"] for key, value in scored.items()} == pytest.approx(dict.fromkeys(METRICS[task], 1.0))
    assert protocol.kind == ("regression" if task == "stsb" else "sequence_classification")


def test_f1_is_about_the_second_class(samples: Path) -> None:
    """MRPC's F1 counts paraphrases; with 1 of 2 found and nothing wrong it is 2/3, by hand."""
    protocol = benchmarks.get("mrpc").protocol()
    records = [{"prediction": p, "reference": r} for p, r in ((1, 1), (0, 1), (0, 0), (0, 0))]
    assert score_records(records, protocol.scores, resamples=20)["f1"]["value"] == pytest.approx(2 / 3)
    assert protocol.labels == ("not_equivalent", "equivalent")


@pytest.mark.parametrize("task", [*TASKS, "newsgroups20"])
def test_a_head_s_settings_fit_the_task_kinds(task: str, samples: Path) -> None:
    from curvelora_eval.tasks import make_task

    benchmark = benchmarks.get(task)
    protocol = benchmark.protocol()
    assert isinstance(protocol, HeadProtocol)
    spec = protocol.task_spec(max_length=64)
    made = make_task(spec)
    made.check_metrics()
    assert spec.max_length == 64 and made.metrics == list(protocol.metrics)
    rows = [protocol.columns(row) for row in benchmarks.load(benchmark, samples).rows]
    assert all(set(spec.columns.values()) == set(row) for row in rows)
