"""AdaLoRA in a run: its schedule fitted to the run's steps, and its budget moved after every optimiser step."""

from __future__ import annotations

import json
import re
from typing import Any

import torch
from peft import AdaLoraConfig, PeftConfig, PeftModel
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from curvelora.methods.adalora import check_schedule

RANKED = re.compile(r"lora_[ABE]")  # AdaLoRA's tensors with a dimension of ranks
AVERAGES = ("ipt", "exp_avg_ipt", "exp_avg_unc")  # of PEFT's RankAllocator


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

    def kept(self, model: PeftModel) -> tuple[dict[str, torch.Tensor], str]:
        """For a checkpoint: the triplets with those that lost their budget, which the saved adapter leaves out, the averages by
        which they are ranked, and (as JSON) the pattern of those that are left."""
        allocator = model.base_model.rankallocator
        tensors = {f"weight:{name}": p.data for name, p in model.named_parameters() if RANKED.search(name)}
        for part in AVERAGES:
            tensors |= {f"{part}:{name}": tensor for name, tensor in getattr(allocator, part).items()}
        whole = {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
        return whole, json.dumps(self._config(model).rank_pattern)

    def restore(self, model: PeftModel, tensors: dict[str, torch.Tensor], rest: str) -> None:
        """Take back what `kept` gave, but for the triplets, which are weights like others."""
        device = next(model.parameters()).device
        for part in AVERAGES:
            held = {n.partition(":")[2]: t.to(device) for n, t in tensors.items() if n.startswith(f"{part}:")}
            setattr(model.base_model.rankallocator, part, held)
        self._config(model).rank_pattern = json.loads(rest)

    @staticmethod
    def _config(model: PeftModel) -> AdaLoraConfig:
        return model.peft_config[model.active_adapter]
