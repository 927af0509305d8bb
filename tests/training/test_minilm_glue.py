"""The runs that give evaluation real adapters: what is started, on small rows and without training."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from curvelora_eval import benchmarks
from curvelora_training import minilm_glue
from curvelora_training.config import load_recipe
from curvelora_training.minilm_glue import METHODS, TASKS


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The commands that would have been started; each succeeds."""
    commands: list[list[str]] = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(minilm_glue.subprocess, "run", run)
    monkeypatch.setattr(minilm_glue, "export_minilm", lambda folder: None)
    return commands


def test_every_task_is_trained_with_every_method_and_scored(
    tmp_path: Path, root: Path, started: list[list[str]]
) -> None:
    data = root / "tests/data/benchmarks"
    complete = tmp_path / "lora/mrpc"
    complete.mkdir(parents=True)
    (complete / "result.json").write_text("{}", encoding="utf-8")
    assert minilm_glue.main(["--data-dir", str(data), "--out", str(tmp_path), "training.epochs=1"]) == 0
    trained = [command for command in started if "curvelora_training.finetune" in command]
    assert len(trained) == len(TASKS) * len(METHODS) - 1  # the complete one is left alone
    for command in trained:
        recipe = load_recipe(Path(command[command.index("--config") + 1]), command[command.index("--config") + 2 :])
        task = recipe.data.train.task
        assert recipe.output == str(tmp_path / recipe.method.name / task) and recipe.training.epochs == 1
        assert recipe.task.kind == benchmarks.get(task).protocol("head").kind
        assert recipe.data.test.split == "validation" and Path(recipe.data.test.path) == data
        assert recipe.adapter_options().get("modules_to_save") == (["pooler"] if task == "stsb" else None)
    scored = [command for command in started if "eval" in command]
    assert [command[command.index("--task") + 1] for command in scored] == list(TASKS)
    assert all(command.count("--adapter") == len(METHODS) for command in scored)


def test_the_checkpoint_s_pooler_was_never_trained(minilm: Path) -> None:
    """Why STS-B trains it: its bias is zero throughout, and its weight is Gaussian noise."""
    with safe_open(str(minilm / "model.safetensors"), framework="pt") as file:
        weight, bias = (file.get_tensor(f"pooler.dense.{name}").double() for name in ("weight", "bias"))
    assert not bias.any()
    standard = (weight - weight.mean()) / weight.std()
    assert abs(standard.pow(4).mean() - 3) < 0.1  # normal; trained matrices have heavier tails
    largest = torch.linalg.svdvals(standard)[0] / (2 * len(bias) ** 0.5)  # a random square matrix has 2 sqrt(n)
    assert abs(largest - 1) < 0.05


@pytest.mark.parametrize(
    ("words", "said"), [(["--task", "mprc"], "did you mean 'mrpc'"), (["--method", "x"], "lora, loran")]
)
def test_unknown_names(
    words: list[str], said: str, started: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert minilm_glue.main(["--data-dir", "data", *words]) == 2
    assert said in capsys.readouterr().err and not started


def test_a_step_that_fails_ends_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, started: list[list[str]]) -> None:
    monkeypatch.setattr(minilm_glue.subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 1))
    assert minilm_glue.main(["--data-dir", str(tmp_path), "--out", str(tmp_path), "--task", "rte"]) == 2
