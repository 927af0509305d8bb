"""A run that was stopped and resumed equals the straight run: weights, losses and scores, bit for bit."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from curvelora.errors import UserError
from curvelora_training import run as run_module
from curvelora_training.checkpoint import flaw, newest_whole, seal
from run_files import metrics, result

# Mid-epoch, with accumulation and dropout: 96 rows, batches of 4, two a step -> 12 steps an epoch.
CHANGES = {"training.batch_size": 4, "training.accumulation": 2, "training.save_every": 5, "training.epochs": 2}


class StopAt(TrainerCallback):
    """What Ctrl-C does, at a known step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.fixture
def stop_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[int | None], None]:
    """`stop_at(8)`: the next runs are interrupted when 8 steps are done; `stop_at(None)`: they are not."""
    original = run_module.AdapterTrainer

    def patch(step: int | None) -> None:
        def make(*args: Any, callbacks: list[Any], **kwargs: Any) -> Any:
            return original(*args, callbacks=[*callbacks, *([StopAt(step)] if step is not None else [])], **kwargs)

        monkeypatch.setattr(run_module, "AdapterTrainer", make)

    return patch


def stopped(
    write: Callable[..., Path], recipe: dict[str, Any], stop_at: Callable[[int | None], None], step: int, output: Path
) -> Path:
    """A run that was interrupted after `step` steps."""
    from curvelora_training.finetune import main

    stop_at(step)
    path = write(recipe, **CHANGES, output=str(output))
    assert main(["--config", str(path)]) == 130
    stop_at(None)
    return path


@pytest.mark.parametrize("method", ["loran", "full"])
def test_resume_equals_the_straight_run(
    method: str,
    recipe: dict[str, Any],
    write: Callable[..., Path],
    finetune: Callable[..., Path],
    stop_at: Callable[..., None],
    tmp_path: Path,
) -> None:
    if method == "full":
        recipe["adapter"] = {"method": "full"}
    straight = finetune(write(recipe, **CHANGES, output=str(tmp_path / "straight")))
    path = stopped(write, recipe, stop_at, 8, tmp_path / "resumed")
    assert not (tmp_path / "resumed/adapter").exists()
    resumed = finetune(path, "--resume")

    wanted, found = (load_file(f / "adapter/adapter_model.safetensors") for f in (straight, resumed))
    assert wanted.keys() == found.keys()
    for name in wanted:
        assert torch.equal(wanted[name], found[name]), name
    keep = ("step", "loss", "grad_norm", "learning_rate", "resolvability_forward")
    assert [[line.get(k) for k in keep] for line in metrics(straight)] == [
        [line.get(k) for k in keep] for line in metrics(resumed)
    ]
    assert result(straight, "evaluation.json")["metrics"] == result(resumed, "evaluation.json")["metrics"]
    assert result(resumed)["steps"] == 24
    assert result(resumed)["first_loss"] == result(straight)["first_loss"]


def test_a_damaged_checkpoint_is_passed_over(
    recipe: dict[str, Any],
    write: Callable[..., Path],
    finetune: Callable[..., Path],
    stop_at: Callable[..., None],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = stopped(write, recipe, stop_at, 12, tmp_path / "run")
    newest = tmp_path / "run/checkpoints/checkpoint-10/adapter_model.safetensors"
    newest.write_bytes(newest.read_bytes()[:-100])
    finetune(path, "--resume")
    printed = capsys.readouterr().out
    assert "checkpoint-10 is not whole and is passed over: adapter_model.safetensors has" in printed
    assert "it is damaged-checkpoint-10 now" in printed
    assert f"resuming from {tmp_path / 'run/checkpoints/checkpoint-5'}" in printed


def test_resume_without_a_checkpoint_starts_from_the_beginning(
    recipe: dict[str, Any],
    write: Callable[..., Path],
    finetune: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = finetune(write(recipe), "--resume")
    assert "starting from the beginning" in capsys.readouterr().out
    assert result(folder)["steps"] == 12


def test_an_existing_run_is_not_overwritten_unasked(
    recipe: dict[str, Any],
    write: Callable[..., Path],
    finetune: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    from curvelora_training.finetune import main

    path = write(recipe)
    folder = finetune(path)
    before = (folder / "result.json").read_bytes()
    assert main(["--config", str(path)]) == 2
    message = capsys.readouterr().err
    assert "holds a run already" in message and "--resume" in message and "--overwrite" in message
    assert (folder / "result.json").read_bytes() == before
    (folder / "mine.txt").write_text("kept")
    shutil.rmtree(folder / "checkpoints")
    finetune(path, "--overwrite")
    assert (folder / "mine.txt").read_text() == "kept"


def test_resume_with_another_recipe_is_refused(
    recipe: dict[str, Any],
    write: Callable[..., Path],
    stop_at: Callable[..., None],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Another batch size would repeat or skip rows; the message names what differs, and nothing is touched."""
    from curvelora_training.finetune import main

    path = stopped(write, recipe, stop_at, 8, tmp_path / "run")
    before = (tmp_path / "run/metrics.jsonl").read_bytes()
    assert main(["--config", str(path), "--resume", "training.batch_size=8", "adapter.r=2"]) == 2
    message = capsys.readouterr().err
    assert "training.batch_size was 4 and is 8" in message and "adapter.r was 4 and is 2" in message
    assert (tmp_path / "run/metrics.jsonl").read_bytes() == before


def test_a_complete_run_is_left_alone(
    recipe: dict[str, Any],
    write: Callable[..., Path],
    finetune: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = write(recipe)
    folder = finetune(path)
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}
    finetune(path, "--resume")
    assert "nothing to resume" in capsys.readouterr().out
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()} == before


class Marker:
    """Unpickling this creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_a_planted_pickle_is_not_run(
    recipe: dict[str, Any],
    write: Callable[..., Path],
    finetune: Callable[..., Path],
    stop_at: Callable[..., None],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = stopped(write, recipe, stop_at, 12, tmp_path / "run")
    checkpoints = tmp_path / "run/checkpoints"
    torch.save({"module": Marker(tmp_path / "executed")}, checkpoints / "checkpoint-10/optimizer.pt")
    finetune(path, "--resume")
    printed = capsys.readouterr().out
    assert "checkpoint-10 is not whole and is passed over: optimizer.pt is not in its manifest" in printed
    assert f"resuming from {checkpoints / 'checkpoint-5'}, written by 1 process" in printed
    assert not (tmp_path / "executed").exists()


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path: Path) -> None:
    """DeepSpeed loads its own files without PyTorch's safeguard, so they are looked at before, also in one with a manifest."""
    temporary, final = tmp_path / ".checkpoint-5.tmp", tmp_path / "checkpoint-5"
    (temporary / "global_step5").mkdir(parents=True)
    torch.save({"module": Marker(tmp_path / "executed")}, temporary / "global_step5/mp_rank_00_model_states.pt")
    seal(temporary, final, {})
    assert flaw(final) is None
    with pytest.raises(UserError, match=r"would run code when it is loaded \(.*Path.*\): delete this checkpoint"):
        newest_whole(tmp_path)
    assert not (tmp_path / "executed").exists()
