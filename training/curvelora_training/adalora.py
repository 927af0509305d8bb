"""AdaLoRA in a run: its schedule fitted to the run's steps, and its budget moved after every optimiser step."""

from __future__ import annotations

from typing import Any

from peft import AdaLoraConfig, PeftConfig, PeftModel
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from curvelora.errors import UserError
from curvelora.methods.adalora import check_schedule
from curvelora_training.config import Recipe
from curvelora_training.run_folder import RunFolder


def fit_schedule(config: PeftConfig, steps: int) -> None:
    """Write the run's steps into `total_step` where the recipe leaves it out; configs of other methods stay as they are.

    Raises:
        UserError: the budget would not shrink, or not reach `target_r` within the run.
    """
    if not isinstance(config, AdaLoraConfig):
        return
    if steps == 0:  # an untrained run has no schedule, but its adapter needs one to be loaded
        config.total_step = config.total_step or config.tinit + config.tfinal + 1
        return
    check_schedule(config, steps)
    config.total_step = config.total_step or steps


def check_resume(recipe: Recipe, folder: RunFolder) -> None:
    """Raise `UserError` where an AdaLoRA run would continue from a checkpoint."""
    if recipe.method.name == "adalora" and folder.newest_checkpoint() is not None:
        raise UserError(
            f"{folder.path} cannot be resumed: AdaLoRA's importance averages and masked triplets are in no checkpoint; train "
            "it anew with --overwrite"
        )


class RankAllocation(TrainerCallback):
    """Calls PEFT's `update_and_allocate` between an optimiser step and the clearing of its gradients.

    Accumulated batches are one optimiser step and count once. Steps count from 1, so that the last step of a schedule is taken
    and its final mask is what is saved.

    Args:
        token_loss: whether the trainer sums the losses of a step, each divided by the tokens of all. The penalty that PEFT
            adds to every loss would then count once for each batch and process; it is divided by their number.
    """

    def __init__(self, token_loss: bool) -> None:
        self.token_loss = token_loss
        self.weight = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: PeftModel, **_: Any
    ) -> None:
        config = self._config(model)
        check_schedule(config, state.max_steps)
        self.weight = config.orth_reg_weight
        if self.token_loss:
            processes = args.world_size if args.average_tokens_across_devices else 1
            config.orth_reg_weight = self.weight / (args.gradient_accumulation_steps * processes)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: PeftModel, **_: Any
    ) -> None:
        model.base_model.update_and_allocate(state.global_step + 1)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: PeftModel, **_: Any
    ) -> None:
        self._config(model).orth_reg_weight = self.weight

    @staticmethod
    def _config(model: PeftModel) -> AdaLoraConfig:
        return model.peft_config[model.active_adapter]
