"""Amplitude and frequency schedules in a run: checked against its length before it starts, set after every step."""

from __future__ import annotations

import math
from typing import Any

from peft import PeftConfig
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from curvelora.errors import UserError
from curvelora.schedules import set_schedule_position
from curvelora_training.config import TrainingSpec
from curvelora_training.distributed import world_size


class CurveSchedule(TrainerCallback):
    """Step k of T trains at position k / T, and what is saved, logged or evaluated after it is at (k + 1) / T."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **_: Any
    ) -> None:
        """Also where a run is resumed: the steps that are done count."""
        set_schedule_position(model, min(state.global_step / state.max_steps, 1.0), state.max_steps)

    on_step_end = on_train_begin


def has_schedule(config: PeftConfig) -> bool:
    """Whether the adapter has something that changes over the run."""
    return bool(getattr(config, "schedules", None))


def total_steps(spec: TrainingSpec, rows: int) -> int:
    """Optimiser steps of a run on `rows` training rows, as transformers counts them."""
    if spec.max_steps is not None:
        return spec.max_steps
    batches = math.ceil(rows / (spec.batch_size * world_size()))
    return math.ceil(spec.epochs * max(1, math.ceil(batches / spec.accumulation)))


def check_schedules(config: PeftConfig, spec: TrainingSpec, rows: int) -> None:
    """Raise `UserError` where a schedule is longer than the run, so that its end would never come."""
    if spec.max_steps == 0 or not has_schedule(config):
        return
    run = total_steps(spec, rows)
    for name, schedule in config.schedules.items():
        if schedule.steps is not None and schedule.steps > run:
            raise UserError(
                f"adapter.{name}_schedule takes {schedule.steps} steps and the run has {run}, so it would never end: "
                "write fewer steps, or a share of the run"
            )
