"""The checkpoint of the lowest validation loss: written when it is found, and kept until there is a better one."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from curvelora_training.config import TrainingSpec


class KeepBest(TrainerCallback):
    """Asks for a checkpoint whenever an evaluation finds a new lowest loss, and remembers its step where rotation looks for it.

    `best_metric` and `best_global_step` are fields of transformers' state, so they lie in every checkpoint. A loss that is no
    number is never the lowest.
    """

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """As an evaluation may end in a checkpoint, and a logged loss is a mean since the last line: log first."""
        control.should_log = control.should_log or control.should_evaluate

    on_epoch_end = on_step_end

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float],
        **_: Any,
    ) -> None:
        loss = metrics["eval_loss"]
        if loss < (float("inf") if state.best_metric is None else state.best_metric):
            state.best_metric, state.best_global_step = loss, state.global_step
            control.should_save = True


def best_checkpoint(spec: TrainingSpec, state: TrainerState) -> dict[str, Any] | None:
    """Step and loss of the checkpoint with the lowest validation loss; None where the recipe asks for none."""
    return {"step": state.best_global_step, "eval_loss": state.best_metric} if spec.keep_best else None
