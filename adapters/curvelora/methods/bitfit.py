"""BitFit: only the bias vectors train, in linear layers and norms, and a new head where there is one.

    h = W0 x + b        b trains, everything else is frozen

Paper: arXiv 2106.10199. PEFT has it as an option of its tuners, and its files: no adapter layer, `bias: all`. Count: every bias
of the model (RoBERTa-base 102,144). Nothing to merge: the trained biases are the model's own.
"""

from __future__ import annotations

from peft import LoraConfig, PeftConfig
from peft.utils.constants import DUMMY_TARGET_MODULES
from torch import nn

from curvelora.errors import UserError
from curvelora.merging import Merge
from curvelora.method import Method


def is_bitfit(config: PeftConfig) -> bool:
    """Whether a config is BitFit's, as it is saved: every bias, and no layer."""
    alone = getattr(config, "target_modules", None) == DUMMY_TARGET_MODULES
    return alone and getattr(config, "bias", "none") == "all"


def check_has_biases(model: nn.Module) -> None:
    """Raise `UserError` for a model that has no bias to train, as LLaMA has none."""
    if not any(
        name.endswith(".bias") and p.requires_grad and "modules_to_save" not in name
        for name, p in model.named_parameters()
    ):
        raise UserError(
            "method bitfit trains bias vectors, and this model has none (most decoders have none): take another method"
        )


METHOD = Method(
    name="bitfit",
    title="BitFit: only the biases train",
    formula="h = W0 x + b,  b trains",
    paper="BitFit (arXiv 2106.10199)",
    provided_by="peft",
    config_class=LoraConfig,
    model_class=None,
    defaults={"target_modules": DUMMY_TARGET_MODULES, "bias": "all"},
    only_options=("modules_to_save",),
    bases=("none",),
    family=lambda config: "model",
    merge=lambda config: Merge.EXACT,
    identity_at_init=lambda config: True,
    trainable_parameters=lambda config, d_out, d_in: d_out,  # where the layer has a bias
    cost="less than LoRA: no adapter layer, but gradients down to the first bias",
    caveats=(
        "Only for models with biases: LLaMA and most decoders have none.",
        "Switching the adapter off does not bring the old biases back, as they were in the model: load the base again.",
        "The base has to be in fp32: biases train in fp32, and norms and linear layers take one dtype.",
    ),
)
