"""AdaLoRA, PEFT's own: triplets of a rank-one direction and its strength, of which training keeps the important ones."""

from __future__ import annotations

import sys
from dataclasses import dataclass

from peft import AdaLoraConfig as PeftAdaLoraConfig

from curvelora.errors import UserError
from curvelora.merging import Merge
from curvelora.method import Method
from curvelora.tuner import check_low_rank, is_number


@dataclass
class AdaLoraConfig(PeftAdaLoraConfig):
    """PEFT's config, except that `total_step` may be left out where only the run knows it.

    Until it is filled in it is None: the adapter can be built, but neither trained nor loaded again. What is saved is PEFT's.
    """

    def __post_init__(self) -> None:
        check_schedule(self)  # first: PEFT says the same without the numbers
        waits = self.total_step is None
        if waits:
            self.total_step = sys.maxsize  # PEFT refuses None before there is a run that could say
        super().__post_init__()
        if waits:
            self.total_step = None


def check_schedule(config: PeftAdaLoraConfig, steps: int | None = None) -> None:
    """Raise `UserError` where the budget would not shrink, or not reach `target_r` within the `steps` of a run."""
    total, settle = config.total_step, config.tinit + config.tfinal
    if total is None:
        total = steps
    if total is None:
        return
    if settle >= total:
        raise UserError(
            f"tinit + tfinal = {settle} leaves none of the {total} steps of total_step to shrink the budget in: write smaller "
            "ones, or train longer"
        )
    if steps is not None and total - config.tfinal > steps:
        raise UserError(
            f"total_step={total} with tfinal={config.tfinal} reaches target_r at step {total - config.tfinal}, and the run "
            f"has {steps} optimiser steps: leave total_step out, which takes the run's"
        )


def _check(config: PeftAdaLoraConfig) -> None:
    # PEFT takes its rank as the scale where alpha is not positive, which no user means
    check_low_rank(config.init_r, [config.lora_alpha], config.lora_dropout, None, None)
    check_low_rank(config.target_r, [], 0.0, None, None)
    if config.target_r >= config.init_r:
        raise UserError(
            f"target_r={config.target_r} must be below init_r={config.init_r}: the rest is what the budget gives up; take "
            "method lora for a fixed rank"
        )
    for name, least in (("tinit", 0), ("tfinal", 0), ("deltaT", 1)):
        value = getattr(config, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise UserError(
                f"{name} must be a whole number of at least {least}, not {value!r}: it counts optimiser steps"
            )
    for name in ("beta1", "beta2"):
        value = getattr(config, name)
        if not is_number(value) or not 0 < value < 1:
            raise UserError(f"{name} must be above 0 and below 1, not {value!r}: it weights a moving average")
    if not is_number(config.orth_reg_weight):
        raise UserError(f"orth_reg_weight must be a number of at least 0, not {config.orth_reg_weight!r}")


METHOD = Method(
    name="adalora",
    title="AdaLoRA: a budget of ranks, moved to where they matter",
    formula="h = W0 x + s B diag(e) A x,  s = alpha / init_r",
    paper="AdaLoRA (arXiv 2303.10512)",
    provided_by="peft",
    config_class=AdaLoraConfig,
    model_class=None,
    # the authors' weight of the penalty where PEFT's class has 0.5
    defaults={"orth_reg_weight": 0.1},
    aliases={"alpha": "lora_alpha", "dropout": "lora_dropout"},
    # PEFT's AdaLoRA ignores r, fills rank_pattern itself, and never reads the other options that it inherits from its LoRA
    only_options=(
        "init_r",
        "target_r",
        "alpha",
        "dropout",
        "tinit",
        "tfinal",
        "deltaT",
        "total_step",
        "beta1",
        "beta2",
        "orth_reg_weight",
        "init_lora_weights",
        "bias",
        "target_modules",
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
        "modules_to_save",
    ),
    family=lambda config: "activation space, linear",
    merge=lambda config: Merge.EXACT,
    identity_at_init=lambda config: bool(config.init_lora_weights),
    trainable_parameters=lambda config, d_out, d_in: config.init_r * (d_in + d_out + 1),
    cost="LoRA at init_r, plus an orthogonality penalty in every pass and a global ranking of triplets in every step",
    caveats=(
        "It trains init_r triplets a layer to the end and masks those that lose; target_r is an average over the layers, "
        "and `r` is not an option.",
        "The allocation needs a call after every optimiser step: `curvelora train` makes it and takes total_step from the "
        "run; in a loop of your own set total_step and call PEFT's `update_and_allocate` before the gradients are cleared.",
        "The loss that is logged, in evaluation too, has the orthogonality penalty in it. PEFT adds it only to a model "
        "whose config has a `task_type`.",
        "The scale divides by the initial rank for ever, and A and B start from N(0, 0.02^2) with e = 0.",
        "PEFT trains one such adapter on a model at a time, and gives no rows adapters of their own.",
    ),
    check=_check,
)
