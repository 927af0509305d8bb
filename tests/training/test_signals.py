"""Signals: one whole checkpoint, an agreed exit code, and a run that resumes as if nothing had been."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import TrainerCallback

from curvelora_training import run as run_module
from curvelora_training import signals
from curvelora_training.checkpoint import flaw
from curvelora_training.finetune import main
from curvelora_training.signals import ASKED, Asked, Stopped
from run_files import metrics, result

# 64 rows, 8 a step in two batches: 8 steps an epoch, 16 in all; three evaluation batches
TRAINING = {
    "learning_rate": 1e-3,
    "batch_size": 4,
    "accumulation": 2,
    "epochs": 2,
    "log_every": 1,
    "eval_batch_size": 8,
}
IN_STEPS = {"evaluate_every": 4, "save_every": 6}


class SendAt(TrainerCallback):
    """Sends this process a signal when `event` comes after `step` steps."""

    def __init__(self, event: str, step: int, number: int) -> None:
        self.step = step
        self.number = number
        setattr(self, event, self._send)

    def _send(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step and self.number:
            os.kill(os.getpid(), self.number)
            self.number = 0


@pytest.fixture(scope="module")
def recipe_file(tmp_path_factory: pytest.TempPathFactory, tiny_models: dict[str, Path], root: Path) -> Path:
    rows = {name: str(root / f"tests/data/sst2_sentences_{name}.tsv") for name in ("train", "unseen")}
    recipe = {
        "output": "unused",
        "model": {"path": str(tiny_models["bert"]), "dtype": "float32"},
        "task": {"kind": "sequence_classification", "columns": {"text": "sentence"}, "max_length": 32},
        "data": {
            "train": {"path": rows["train"], "limit": 64},
            "validation": {"path": rows["unseen"], "limit": 24},
            "test": {"path": rows["unseen"], "limit": 8},
        },
        "adapter": {"method": "loran", "r": 4, "alpha": 8, "dropout": 0.1, "target_modules": ["query", "value"]},
        "training": TRAINING,
    }
    path = tmp_path_factory.mktemp("signals") / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return path


@pytest.fixture
def go(recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """`go("--resume", send=("on_step_begin", 2, signal.SIGTERM))` -> exit code of a run in tmp_path / "run"."""
    original = run_module.AdapterTrainer

    def run(*arguments: str, send: tuple[str, int, int] | None = None) -> int:
        def make(*args: Any, callbacks: list[Any], **kwargs: Any) -> Any:
            return original(*args, callbacks=[*callbacks, *([SendAt(*send)] if send else [])], **kwargs)

        monkeypatch.setattr(run_module, "AdapterTrainer", make)
        return main(["--config", str(recipe_file), f"output={tmp_path / 'run'}", *arguments])

    return run


@pytest.fixture(scope="module")
def straight(recipe_file: Path) -> Callable[[tuple[str, ...]], Path]:
    """The run that nothing stopped, with these overrides; made once."""

    def run(overrides: tuple[str, ...]) -> Path:
        folder = recipe_file.parent / f"straight{len(overrides)}"
        if not folder.exists():
            torch.set_num_threads(1)
            assert main(["--config", str(recipe_file), f"output={folder}", *overrides]) == 0
        return folder

    return run


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").glob("*"))


def same_run(found: Path, wanted: Path) -> None:
    """Weights, losses and evaluations are equal bit for bit; a resumed run has one line more, which says that it was stopped."""
    keep = ("step", "loss", "grad_norm", "learning_rate", "eval_loss")
    lines = [[[line.get(key) for key in keep] for line in metrics(f) if "stopped" not in line] for f in (found, wanted)]
    assert lines[0] == lines[1]
    weights = [load_file(f / "adapter/adapter_model.safetensors") for f in (found, wanted)]
    assert weights[0].keys() == weights[1].keys() and all(torch.equal(weights[0][k], weights[1][k]) for k in weights[0])
    assert result(found)["last_loss"] == result(wanted)["last_loss"]


@pytest.mark.parametrize(
    ("send", "overrides", "saved"),
    [
        (("on_step_begin", 2, signal.SIGTERM), IN_STEPS, 3),
        (("on_substep_end", 4, signal.SIGINT), IN_STEPS, 5),  # between two batches of a step
        (("on_step_begin", 3, signal.SIGUSR1), IN_STEPS, 4),  # an evaluation is due after it
        (("on_prediction_step", 8, signal.SIGTERM), IN_STEPS, 8),
        (("on_evaluate", 12, signal.SIGUSR1), IN_STEPS, 12),  # an evaluation and a save are due
        (("on_step_begin", 7, signal.SIGTERM), {}, 8),  # the end of an epoch, which evaluates and saves
        (("on_prediction_step", 8, signal.SIGINT), {}, 8),
        (("on_step_begin", 9, signal.SIGTERM), {}, 10),
    ],
)
def test_one_checkpoint_and_the_straight_run_after_it(
    go: Callable[..., int],
    straight: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    send: tuple[str, int, int],
    overrides: dict[str, int],
    saved: int,
) -> None:
    saves = []
    original = run_module.AdapterTrainer._save_checkpoint
    monkeypatch.setattr(
        run_module.AdapterTrainer,
        "_save_checkpoint",
        lambda self, *args: (saves.append(self.state.global_step), original(self, *args)),
    )
    options = tuple(f"training.{key}={value}" for key, value in overrides.items())
    before = [signal.getsignal(number) for number in signals.CODES]
    assert go(*options, send=send) == signals.CODES[send[2]]
    assert [signal.getsignal(number) for number in signals.CODES] == before
    folder = tmp_path / "run"
    newest = folder / f"checkpoints/checkpoint-{saved}"
    assert f"checkpoint-{saved}" in checkpoints(folder) and flaw(newest) is None
    assert saves.count(saved) == 1 and saves[-1] == saved
    assert f"saved as {newest}: continue with the same command and --resume" in capsys.readouterr().err
    assert not (folder / "adapter").exists() and not (folder / "result.json").exists()
    assert metrics(folder)[-1]["stopped"]["code"] == signals.CODES[send[2]]
    assert go(*options, "--resume") == 0
    same_run(folder, straight(options))


def test_a_signal_while_saving_lets_the_save_be_the_last_one(
    go: Callable[..., int], straight: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = []
    original = run_module.AdapterTrainer._save

    def save(self: Any, output_dir: str, state_dict: Any = None) -> None:
        if not saved:
            os.kill(os.getpid(), signal.SIGTERM)
        saved.append(Path(output_dir).name)
        original(self, output_dir, state_dict)

    monkeypatch.setattr(run_module.AdapterTrainer, "_save", save)
    options = tuple(f"training.{key}={value}" for key, value in IN_STEPS.items())
    assert go(*options) == signals.REQUEUE
    assert saved == [".checkpoint-6.tmp"] and checkpoints(tmp_path / "run") == ["checkpoint-6"]
    assert flaw(tmp_path / "run/checkpoints/checkpoint-6") is None
    assert go(*options, "--resume") == 0
    same_run(tmp_path / "run", straight(options))


@pytest.mark.parametrize("place", ["load_processor", "load_base", "measure_start"])
def test_a_signal_at_the_start_leaves_no_checkpoint(
    go: Callable[..., int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    place: str,
) -> None:
    original = getattr(run_module, place)

    def send(*args: Any, **kwargs: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return original(*args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(run_module, place, send)
        assert go() == signals.REQUEUE
    assert "there was nothing to save" in capsys.readouterr().err or place != "measure_start"
    folder = tmp_path / "run"
    assert checkpoints(folder) == [] and not (folder / "lease.json").exists()
    assert go("--resume") == 0 and result(folder)["steps"] == 16


def test_a_signal_while_the_test_rows_are_scored_stops_at_once(
    go: Callable[..., int], straight: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reached = []

    def score(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        reached.append("the end")

    with monkeypatch.context() as patched:
        patched.setattr(run_module, "score_unseen", score)
        assert go() == signals.INTERRUPTED
    assert reached == [] and not (tmp_path / "run/result.json").exists()
    assert go("--resume") == 0
    same_run(tmp_path / "run", straight(()))


def test_a_second_signal_ends_the_process_and_an_echo_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """A launcher passes on what its children have already; SIGUSR1 is followed by SIGTERM, which is then the first."""
    done: list[Any] = []
    clock = [100.0]
    monkeypatch.setattr(signals.os, "kill", lambda pid, number: done.append(("kill", number)))
    monkeypatch.setattr(signals.os, "write", lambda *_: None)
    monkeypatch.setattr(signals.signal, "signal", lambda number, handler: done.append((number, handler)))
    monkeypatch.setattr(signals.time, "monotonic", lambda: clock[0])
    asked = Asked()
    for number in (signal.SIGUSR1, signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM):
        asked.handle(number, None)
    clock[0] += signals.ECHO - 0.1
    asked.handle(signal.SIGTERM, None)
    clock[0] += 0.2
    asked.handle(signal.SIGUSR1, None)
    assert done == [] and asked.code == signals.REQUEUE
    asked.handle(signal.SIGINT, None)
    assert done == [(signal.SIGINT, signal.SIG_DFL), ("kill", signal.SIGINT)]
    assert asked.code == signals.INTERRUPTED


def test_a_signal_that_came_before_is_raised_where_nobody_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals.os, "write", lambda *_: None)
    asked = Asked()
    asked.let_through(False)
    asked.handle(signal.SIGUSR1, None)
    with pytest.raises(Stopped, match="continue with the same command and --resume") as caught:
        asked.let_through(True)
    assert caught.value.code == signals.REQUEUE and ASKED.code == 0


def test_the_command_in_a_process_of_its_own(recipe_file: Path, tmp_path: Path) -> None:
    """SIGTERM from outside while it trains: exit code 75 and a checkpoint of the step before, which the message names."""
    folder = tmp_path / "run"
    command = [sys.executable, "-m", "curvelora_training.finetune", "--config", str(recipe_file), f"output={folder}"]
    running = subprocess.Popen(
        [*command, "training.epochs=10000"],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        until = time.monotonic() + 300
        log = folder / "metrics.jsonl"
        while (
            not (log.exists() and '"loss"' in log.read_text()) and running.poll() is None and time.monotonic() < until
        ):
            time.sleep(0.1)
        running.terminate()
        _, said = running.communicate(timeout=300)
    finally:
        running.kill()
    assert running.returncode == signals.REQUEUE, said
    newest = max((folder / "checkpoints").iterdir(), key=lambda path: int(path.name.rpartition("-")[2]))
    assert flaw(newest) is None and f"saved as {newest}: continue with the same command and --resume" in said


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_while_libraries_are_imported(recipe_file: Path, tmp_path: Path, number: signal.Signals) -> None:
    command = [sys.executable, "-m", "curvelora_training.finetune", "--config", str(recipe_file)]
    running = subprocess.Popen(
        [*command, f"output={tmp_path / 'run'}"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    try:
        caught, until = 0, time.monotonic() + 300
        while not caught & 1 << (signal.SIGUSR1 - 1) and running.poll() is None and time.monotonic() < until:
            text = Path(f"/proc/{running.pid}/status").read_text()
            caught = int(next(line for line in text.splitlines() if line.startswith("SigCgt")).split()[1], 16)
        time.sleep(0.5)
        running.send_signal(number)
        _, said = running.communicate(timeout=300)
    finally:
        running.kill()
    assert running.returncode == signals.CODES[number], said
    assert b"--resume" in said and not (tmp_path / "run").exists()


def test_help_names_the_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    said = capsys.readouterr().out
    assert f"{signals.REQUEUE} stopped by SIGTERM or SIGUSR1" in said and str(signals.INTERRUPTED) in said
