"""Amplitude and frequency schedules in a run: checked against its length before it starts, set after every step."""

from __future__ import annotations

from typing import Any

from peft import PeftConfig
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from curvelora.errors import UserError
from curvelora.schedules import set_schedule_position


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


def check_schedules(config: PeftConfig, run: int) -> None:
    """Raise `UserError` where a schedule is longer than the run's optimiser steps, so that its end would never come."""
    if run == 0 or not has_schedule(config):  # an untrained run has none to end
        return
    for name, schedule in config.schedules.items():
        if schedule.steps is not None and schedule.steps > run:
            raise UserError(
                f"adapter.{name}_schedule takes {schedule.steps} steps and the run has {run}, so it would never end: "
                "write fewer steps, or a share of the run"
            )
