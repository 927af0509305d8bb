"""`curvelora tasks`: the list, one task, JSON; and docs/tasks.md, which is written from the same."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from curvelora.cli import run_module
from curvelora.errors import UserError
from curvelora_eval import benchmarks, tasks_command
from curvelora_eval.benchmarks import quirks
from curvelora_eval.benchmarks.describe import page


def run(*arguments: str) -> int:
    return run_module(tasks_command, "curvelora tasks", list(arguments))


def test_the_list_names_every_task_and_what_is_there(samples: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run() == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == list(benchmarks.BENCHMARKS)
    assert "train 9,427, test 3,270" in lines[1]
    assert run("--data-dir", str(samples)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "train subset 12 of 9427, test subset 12 of 3270" in lines[1]
    assert "train - of 16,113, test subset 12 of 1838" in lines[2]


@pytest.mark.parametrize(
    ("words", "said"), [(["--json"], "--json"), (["boolq"], "boolq"), (["boolq", "--json"], "--json")]
)
def test_forms_that_exclude_each_other(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match=f"--markdown .* does not go with .*{said}"):
        run(*words, "--markdown")
    assert capsys.readouterr().out == ""


def test_one_task_is_explained_with_a_prompt(samples: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("boolq", "--data-dir", str(samples)) == 0
    out = capsys.readouterr().out
    for said in (
        "BoolQ, yes/no questions without the passage",
        "arXiv 1905.10044",
        "closed book",
        benchmarks.get("boolq").protocol().hash("legacy"),
        "  | ### Instruction:\n  | Please answer the following question with true or false, question: is a lighthouse lamp",
        "Answer:' -> ' yes'",
        "not comparable with BoolQ scores that read it",
        *quirks.QUIRKS,
    ):
        assert said in out


@pytest.mark.parametrize("task", benchmarks.BENCHMARKS)
def test_every_task_can_be_explained(task: str, samples: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(task, "--data-dir", str(samples)) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"{task}: ") and "\nexample " in out


def test_json_holds_everything(samples: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("arc_easy", "--json", "--data-dir", str(samples)) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["splits"]["test"] | {"path": ""} == {
        "files": ["commonsense/ARC-Easy/test.json", "ARC-Easy/test.json"],
        "hub": "test",
        "published": 2376,
        "unit": "rows",
        "labelled": True,
        "note": "",
        "found": 8,
        "subset": "subset 8 of 2376",
        "left_out": 0,
        "path": "",
        "problem": None,
    }
    assert found["protocols"]["loglikelihood"]["metrics"] == ["accuracy", "accuracy_norm"]
    assert run("--json") == 0
    assert len(json.loads(capsys.readouterr().out)) == len(benchmarks.BENCHMARKS)


def test_a_damaged_file_does_not_hide_the_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "boolq").mkdir()
    (tmp_path / "boolq/test.json").write_text("[{")
    assert run("--data-dir", str(tmp_path)) == 0
    assert "test damaged" in capsys.readouterr().out.splitlines()[1]
    packed = gzip.compress(json.dumps(list(range(999))).encode())
    for name, content in {
        "piqa": packed[:20] + b"\xff" * 40 + packed[60:],
        "social_i_qa": gzip.compress(b"[" * 100_000),
    }.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "test.json.gz").write_bytes(content)
    assert run("--data-dir", str(tmp_path)) == 0
    assert capsys.readouterr().out.count("test damaged") == 3
    assert run("boolq", "--data-dir", str(tmp_path)) == 0
    assert "neither a JSON list nor JSON lines" in " ".join(capsys.readouterr().out.split())


def test_an_answer_that_is_no_number_is_said_and_not_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "gsm8k").mkdir()
    (tmp_path / "gsm8k/test.jsonl").write_text('{"question": "a", "answer": "b #### twelve"}')
    assert run("gsm8k", "--data-dir", str(tmp_path)) == 0
    assert "that is no number (test-0 has 'twelve')" in " ".join(capsys.readouterr().out.split())


def test_bad_arguments() -> None:
    with pytest.raises(UserError, match="did you mean 'winogrande'"):
        run("winogrand")
    with pytest.raises(UserError, match="is no folder"):
        run("--data-dir", "nowhere")


def test_the_page_is_what_the_code_says(root: Path) -> None:
    assert (root / "docs/tasks.md").read_text(encoding="utf-8") == page(), (
        "write it again: python -m curvelora_eval.benchmarks.describe > docs/tasks.md"
    )


def test_quirks_are_chosen_by_name() -> None:
    assert [quirk.name for quirk in quirks.choose(["no-cache", "adapter-dropout"])] == ["adapter-dropout", "no-cache"]
    assert len(quirks.choose(["all"])) == len(quirks.QUIRKS)
    assert quirks.choose([]) == ()
    with pytest.raises(UserError, match="no quirk 'no-cach'; did you mean 'no-cache'"):
        quirks.choose(["no-cach"])
