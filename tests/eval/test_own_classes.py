"""A bare checkpoint with a trained head is read in the order of its own classes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from curvelora import cli
from curvelora.errors import UserError
from curvelora_eval import benchmarks
from curvelora_eval.evaluation.own_classes import in_own_order
from named_tasks import read_lines
from run_files import result

pytestmark = pytest.mark.usefixtures("offline")
NAMES = {0: "CONTRADICTION", 1: "Neutral", 2: "entailment"}


@pytest.fixture(scope="module")
def classifier(tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT with a head for three classes, saved as any checkpoint is."""
    folder = tmp_path_factory.mktemp("three") / "classifier"
    config = AutoConfig.from_pretrained(tiny_models["bert"], id2label=NAMES, label2id={n: i for i, n in NAMES.items()})
    torch.manual_seed(3)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_models["bert"]).save_pretrained(folder)
    return folder


@pytest.fixture
def bare(classifier: Path, root: Path, tmp_path: Path) -> Callable[..., Path]:
    """`bare(out, task)` -> the folder of the results of the bare checkpoint."""

    def run(out: str, task: str = "mnli", code: int = 0) -> Path:
        given = [
            "--model",
            classifier,
            "--dtype",
            "float32",
            "--task",
            task,
            "--data-dir",
            root / "tests/data/benchmarks",
        ]
        given += ["--out", tmp_path / out, "--batch-check", 0]
        assert cli.main(["eval", *map(str, given)]) == code
        return tmp_path / out / "baseline" / task

    return run


def test_logits_are_in_the_benchmarks_order_and_the_head_in_its_own(
    bare: Callable[..., Path], classifier: Path, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Against transformers' own model: its id2label says what its largest logit means."""
    folder = bare("named")
    tokenizer = AutoTokenizer.from_pretrained(classifier)
    model = AutoModelForSequenceClassification.from_pretrained(classifier).eval()
    task = benchmarks.get("mnli")
    rows = benchmarks.load(task, root / "tests/data/benchmarks").rows
    lines = read_lines(folder / "predictions.jsonl")
    assert len(lines) == len(rows) > 1
    for line, row in zip(lines, rows, strict=True):
        with torch.no_grad():
            inputs = tokenizer(row.fields["text"], row.fields["text_pair"], return_tensors="pt")
            contradiction, neutral, entailment = model(**inputs).logits[0].tolist()
        assert line["logits"] == pytest.approx([entailment, neutral, contradiction], abs=1e-4)
    assert result(folder, "evaluation.json")["classes"]["known_by"] == "name"
    config = classifier / "config.json"
    content = config.read_text()
    try:
        unnamed = {str(i): f"LABEL_{i}" for i in range(3)}
        config.write_text(json.dumps(json.loads(content) | {"id2label": unnamed, "label2id": {}}))
        capsys.readouterr()
        folder = bare("unnamed")
    finally:
        config.write_text(content)
    order = ["entailment", "neutral", "contradiction"]
    assert result(folder, "evaluation.json")["classes"] == {"order": order, "known_by": "position"}
    note = "nothing names the head's classes: they are taken in the task's own order"
    assert note in capsys.readouterr().out
    assert note in (folder.parent.parent / "summary.md").read_text()
    assert [line["logits"][::-1] for line in read_lines(folder / "predictions.jsonl")] == [
        pytest.approx(line["logits"], abs=1e-4) for line in lines
    ]


def test_other_classes_are_refused_for_every_task(
    bare: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    bare("other", "mnli,rte,mrpc", code=2)
    error = capsys.readouterr().err
    assert "CONTRADICTION, Neutral, entailment, and rte has entailment, not_entailment" in error
    assert "and mrpc has not_equivalent, equivalent" in error and "mnli has" not in error


def test_names_are_compared_as_people_read_them() -> None:
    labels = ("not_equivalent", "equivalent")
    assert in_own_order(("Equivalent", "NOT equivalent"), labels, "mrpc") == ["equivalent", "not_equivalent"]
    assert (
        in_own_order(("0", "1"), labels, "mrpc") == in_own_order(("LABEL_0", "label_1"), labels, "mrpc") == list(labels)
    )
    for classes in (("1", "0"), ("equivalent", "other"), ("LABEL_0", "LABEL_1", "LABEL_2"), ("equivalent",) * 2):
        with pytest.raises(UserError, match="mrpc has not_equivalent, equivalent"):
            in_own_order(classes, labels, "mrpc")
