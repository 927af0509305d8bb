"""Schedules in runs: the saved adapter is at the end, checkpoints in between, a resumed run like a straight one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from curvelora_training.config import TrainingSpec
from curvelora_training.finetune import main
from curvelora_training.prepare import load_and_prepare
from curvelora_training.run_length import optimiser_steps

# 96 rows in batches of 8: 12 steps
ADAPTER = {"method": "loran", "r": 4, "alpha": 8, "amplitude": 0.02, "target_modules": ["query", "value"]}


def factors(folder: Path) -> set[tuple[float, ...]]:
    """The factors that the adapter in `folder` holds, over its layers."""
    weights = load_file(folder / "adapter_model.safetensors")
    return {tuple(t.tolist()) for name, t in weights.items() if "loran_schedule" in name}


def test_a_run_ends_where_its_schedule_ends(
    recipe: dict[str, Any], write: Callable[..., Path], finetune: Callable[..., Path], tmp_path: Path
) -> None:
    schedules = {
        "amplitude_schedule": {"kind": "anneal", "share": 1.0},
        "frequency_schedule": {"kind": "warmup", "steps": 8},
    }
    changes = {"training.save_every": 6, "adapter": ADAPTER | schedules | {"learn": "both"}}
    folder = finetune(write(recipe, **changes))
    assert factors(folder / "checkpoints/checkpoint-6") == {(0.5, 0.75)}
    assert factors(folder / "adapter") == {(0.0, 1.0)}

    # resumed from the middle: the same adapter
    other = finetune(write(recipe, **changes), f"output={tmp_path / 'again'}")
    for name in ("adapter", "checkpoints/checkpoint-12", "result.json"):
        path = other / name
        path.rename(other / f"{path.name}.away")
    assert finetune(write(recipe, **changes), f"output={tmp_path / 'again'}", "--resume") == other
    first, second = (load_file(f / "adapter/adapter_model.safetensors") for f in (folder, other))
    assert first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)


@pytest.mark.parametrize(
    ("schedule", "training", "said"),
    [
        ({"kind": "anneal", "steps": 13}, {}, "takes 13 steps and the run has 12, so it would never end"),
        ({"kind": "anneal", "steps": 12}, {"training.max_steps": 11}, "takes 12 steps and the run has 11"),
        ({"kind": "anneal", "share": 1.2}, {}, "not 1.2: a longer schedule would never end"),
    ],
    ids=str,
)
def test_a_schedule_that_is_longer_than_the_run_is_refused(
    recipe: dict[str, Any],
    write: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
    schedule: dict[str, Any],
    training: dict[str, Any],
    said: str,
) -> None:
    path = write(recipe, **training, adapter=ADAPTER | {"amplitude_schedule": schedule})
    assert main(["--config", str(path), "--dry-run"]) != 0
    shown = capsys.readouterr()
    assert said in " ".join((shown.out + shown.err).split())


def test_one_that_fits_is_taken(recipe: dict[str, Any], write: Callable[..., Path]) -> None:
    adapter = ADAPTER | {"amplitude_schedule": {"kind": "cosine", "steps": 12}}
    prepared = load_and_prepare(write(recipe, adapter=adapter), [])
    assert prepared.peft_config.schedules["amplitude"].steps == 12


@pytest.mark.parametrize(
    ("options", "expected"),
    [({}, 36), ({"accumulation": 5}, 9), ({"epochs": 0.5}, 6), ({"max_steps": 7}, 7), ({"batch_size": 500}, 3)],
    ids=str,
)
def test_steps_are_counted_as_transformers_does(options: dict[str, Any], expected: int) -> None:
    assert optimiser_steps(TrainingSpec(**({"batch_size": 8} | options)), 96) == expected
