"""`curvelora eval` on an adapter that was really trained: the same scores as the run's own, from its folder alone, offline."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import platform
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from curvelora import cli
from curvelora_eval.spec import read_task, write_task
from run_files import result


@pytest.fixture
def unseen(root: Path) -> Path:
    return root / "tests/data/sst2_sentences_unseen.tsv"


@pytest.fixture
def evaluate(tmp_path: Path, unseen: Path) -> Callable[..., dict[str, Any]]:
    """`evaluate("--adapter", folder)` -> evaluation.json; the first 60 unseen rows unless `--limit` says otherwise."""

    def run(*arguments: Any, code: int = 0) -> dict[str, Any]:
        out = tmp_path / "scores"
        given = [str(argument) for argument in arguments]
        assert cli.main(["eval", "--data", str(unseen), "--limit", "60", "--out", str(out), *given]) == code
        return result(out, "evaluation.json") if code == 0 else {}

    return run


def test_the_scores_of_the_run_itself(trained_run: Path, evaluate: Callable[..., Any], tmp_path: Path) -> None:
    found, wanted = evaluate("--adapter", trained_run / "adapter"), result(trained_run, "evaluation.json")
    assert found["metrics"] == wanted["metrics"]
    assert len({metric["value"] for metric in found["metrics"].values()}) > 1
    for key in ("schema", "kind", "task", "primary_metric", "interval", "counts", "model", "adapter", "dataset"):
        assert found[key] == wanted[key], key
    predictions = (tmp_path / "scores/predictions.jsonl").read_bytes()
    assert predictions == (trained_run / "predictions.jsonl").read_bytes()
    assert {p.name for p in (tmp_path / "scores").iterdir()} == {"evaluation.json", "predictions.jsonl"}


def test_the_scores_say_where_they_come_from(trained_run: Path, evaluate: Callable[..., Any], unseen: Path) -> None:
    found = evaluate("--adapter", trained_run / "adapter")
    assert found["dataset"]["sha256"] == hashlib.sha256(unseen.read_bytes()).hexdigest()
    assert found["dataset"]["rows"] == found["counts"]["rows"] == 60
    weights = (trained_run / "adapter/adapter_model.safetensors").read_bytes()
    assert found["adapter"]["sha256"] == hashlib.sha256(weights).hexdigest()
    assert torch.__version__.startswith(found["versions"]["torch"].partition("+")[0]) and {
        "curvelora",
        "curvelora-eval",
    } <= set(found["versions"])
    assert found["python"] == platform.python_version()
    assert found["hardware"]["cpu_cores"] >= 1 and found["hardware"]["memory_bytes"] > 1 << 28
    assert {"seed", "level", "resamples", "method"} == set(found["interval"])
    assert found["rows_per_second"] == pytest.approx(60 / found["seconds"])
    for metric in found["metrics"].values():
        assert metric["low"] <= metric["value"] <= metric["high"] and metric["low"] < metric["high"]


def test_predictions_explain_the_accuracy(trained_run: Path, evaluate: Callable[..., Any], tmp_path: Path) -> None:
    found = evaluate("--adapter", trained_run / "adapter")
    lines = (tmp_path / "scores/predictions.jsonl").read_text(encoding="utf-8").splitlines()
    read = [json.loads(line) for line in lines]
    assert [line["row"] for line in read] == list(range(60))
    right = sum(line["prediction"] == line["reference"] for line in read)
    assert found["metrics"]["accuracy"]["value"] == pytest.approx(right / 60)


def test_what_is_printed(
    trained_run: Path, evaluate: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = evaluate("--adapter", trained_run / "adapter")
    *metrics, written = capsys.readouterr().out.splitlines()
    assert written == f"written: {tmp_path / 'scores/evaluation.json'}"
    for line, (name, value) in zip(metrics, found["metrics"].items(), strict=True):
        assert line.split()[0] == name and f"{value['value']:.4f} [{value['low']:.4f}" in line and "(60 rows)" in line


def test_limit_and_metrics(trained_run: Path, evaluate: Callable[..., Any]) -> None:
    found = evaluate("--adapter", trained_run / "adapter", "--limit", "7", "--metrics", "matthews,accuracy")
    assert list(found["metrics"]) == ["matthews", "accuracy"] and found["primary_metric"] == "matthews"
    assert found["dataset"]["rows"] == found["counts"]["rows"] == 7


def test_other_columns_and_words_for_labels(
    trained_run: Path, evaluate: Callable[..., Any], unseen: Path, tmp_path: Path
) -> None:
    """The same rows under other names and with words for labels give the same scores."""
    lines = [line.split("\t") for line in unseen.read_text(encoding="utf-8").splitlines()[1:61]]
    other = tmp_path / "other.jsonl"
    words = {"0": "negative", "1": "positive"}
    other.write_text(
        "".join(json.dumps({"head": t[:9], "tail": t[9:], "tone": words[label]}) + "\n" for t, label in lines),
        encoding="utf-8",
    )
    mapped = ["--column", "text={head}{tail}", "--column", "label=tone", "--labels", "negative,positive"]
    found = evaluate("--adapter", trained_run / "adapter", "--data", other, *mapped)
    assert found["metrics"] == result(trained_run, "evaluation.json")["metrics"]
    scored = tmp_path / "scores/predictions.jsonl"
    before = [json.loads(line) for line in scored.read_text(encoding="utf-8").splitlines()]
    turned = evaluate("--adapter", trained_run / "adapter", "--data", other, *mapped[:-1], "positive,negative")
    after = [json.loads(line) for line in scored.read_text(encoding="utf-8").splitlines()]
    assert [line["reference"] for line in after] == [1 - line["reference"] for line in before]
    assert [line["prediction"] for line in after] == [line["prediction"] for line in before]
    assert turned["metrics"]["accuracy"]["value"] == pytest.approx(1 - found["metrics"]["accuracy"]["value"])


def test_the_batch_size_changes_nothing(trained_run: Path, evaluate: Callable[..., Any]) -> None:
    first, second = (evaluate("--adapter", trained_run / "adapter", "--batch-size", n) for n in (1, 60))
    assert first["metrics"] == second["metrics"] and (first["batch_size"], second["batch_size"]) == (1, 60)


def test_a_moved_base_and_a_moved_adapter(trained_run: Path, evaluate: Callable[..., Any], tmp_path: Path) -> None:
    base, adapter = (
        shutil.copytree(a, tmp_path / b)
        for a, b in ((trained_run.parent / "base", "base"), (trained_run / "adapter", "mine"))
    )
    found = evaluate("--adapter", adapter, "--model", base)
    assert found["metrics"] == result(trained_run, "evaluation.json")["metrics"]
    assert (found["model"]["path"], found["adapter"]["path"]) == (str(base), str(adapter))


def test_another_dtype_is_taken_from_the_command_line(trained_run: Path, evaluate: Callable[..., Any]) -> None:
    assert evaluate("--adapter", trained_run / "adapter", "--dtype", "bfloat16")["model"]["dtype"] == "bfloat16"


def test_an_adapter_without_task_needs_model_and_task(
    trained_run: Path, evaluate: Callable[..., Any], tmp_path: Path
) -> None:
    adapter = Path(shutil.copytree(trained_run / "adapter", tmp_path / "mine"))
    model, task = read_task(adapter)
    write_task(
        adapter, model, dataclasses.replace(task, max_length=256)
    )  # which no argument can say, so it is the default
    wanted = evaluate("--adapter", adapter)["metrics"]
    (adapter / "task.json").unlink()
    evaluate("--adapter", adapter, code=2)
    described = ["--model", trained_run.parent / "base", "--dtype", "float32", "--task", "sequence_classification"]
    described += ["--column", "text=sentence", "--labels", "0,1"]
    assert evaluate("--adapter", adapter, *described)["metrics"] == wanted


def test_a_bare_model(evaluate: Callable[..., Any], tiny_models: dict[str, Path]) -> None:
    described = ["--dtype", "float32", "--task", "causal_lm", "--column", "text=sentence"]
    evaluate("--model", tiny_models["llama"], code=2)
    evaluate("--task", "causal_lm", code=2)
    found = evaluate("--model", tiny_models["llama"], *described, "--limit", "9")
    assert found["adapter"] is None and found["decoding"] == "greedy, do_sample=False"
    # random weights know nothing, so the perplexity is about the size of the vocabulary
    assert 300 < found["metrics"]["perplexity"]["value"] < 800


def test_a_bare_classifier_keeps_its_head(
    evaluate: Callable[..., Any], tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    """A checkpoint that has a head is scored with it, twice the same; one that has none is refused (test_bad_input)."""
    folder = Path(shutil.copytree(tiny_models["bert"], tmp_path / "classifier"))
    AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2).save_pretrained(folder)
    described = [
        "--dtype",
        "float32",
        "--task",
        "sequence_classification",
        "--column",
        "text=sentence",
        "--labels",
        "0,1",
    ]
    first, second = (evaluate("--model", folder, *described) for _ in range(2))
    assert first["metrics"] == second["metrics"]


def test_the_task_file_reads_back(trained_run: Path, tmp_path: Path) -> None:
    model, task = read_task(trained_run / "adapter")
    assert (task.kind, task.labels, task.columns, task.max_length) == (
        "sequence_classification",
        ["0", "1"],
        {"text": "sentence"},
        32,
    )
    write_task(tmp_path, model, task)
    assert read_task(tmp_path) == (model, task)
    assert read_task(tmp_path / "none") is None


def test_an_adapter_cannot_switch_remote_code_on(tmp_path: Path) -> None:
    """task.json comes with the adapter, which may come from elsewhere; only the command line may trust code."""
    import argparse

    from curvelora_eval.eval_command import add_arguments, resolve
    from curvelora_eval.spec import ModelSpec, TaskSpec, write_task

    write_task(tmp_path, ModelSpec(path="somewhere", trust_remote_code=True), TaskSpec(kind="causal_lm"))
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    given = ["--adapter", str(tmp_path), "--data", "rows.csv", "--out", "out"]
    assert resolve(parser.parse_args(given))[0].trust_remote_code is False
    assert resolve(parser.parse_args([*given, "--trust-remote-code"]))[0].trust_remote_code is True


def test_a_revision_goes_with_its_path(tmp_path: Path) -> None:
    """Another model has no such commit."""
    import argparse

    from curvelora_eval.eval_command import add_arguments, resolve
    from curvelora_eval.spec import ModelSpec, TaskSpec, write_task

    write_task(tmp_path, ModelSpec(path="org/seven", revision="abc"), TaskSpec(kind="causal_lm"))
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    given = ["--adapter", str(tmp_path), "--data", "rows.csv", "--out", "out"]
    found = [
        resolve(parser.parse_args([*given, *more]))[0] for more in ([], ["--model", "org/seven"], ["--model", "o/8"])
    ]
    assert [(spec.path, spec.revision) for spec in found] == [("org/seven", "abc"), ("org/seven", "abc"), ("o/8", None)]


def test_another_task_drops_the_stored_columns(tmp_path: Path) -> None:
    import argparse

    from curvelora_eval.eval_command import add_arguments, resolve
    from curvelora_eval.spec import ModelSpec, TaskSpec, write_task

    stored = TaskSpec(kind="sequence_classification", columns={"text": "a"}, labels=["x", "y"])
    write_task(tmp_path, ModelSpec(path="somewhere"), stored)
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    given = ["--adapter", str(tmp_path), "--data", "rows.csv", "--out", "out", "--max-length", "9"]
    same = resolve(parser.parse_args(given))[1]
    assert (same.columns, same.labels, same.max_length) == ({"text": "a"}, ["x", "y"], 9)
    other = resolve(parser.parse_args([*given, "--task", "causal_lm", "--column", "text=b"]))[1]
    assert (other.kind, other.columns, other.labels) == ("causal_lm", {"text": "b"}, None)
