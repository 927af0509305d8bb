"""LoRA and QLoRA, PEFT's own implementation: the linear reference that every nonlinear method is measured against."""

from __future__ import annotations

from peft import LoraConfig

from curvelora.merging import Merge
from curvelora.method import Method
from curvelora.tuner import check_low_rank


def _merge(config: LoraConfig) -> Merge:
    # activated LoRA changes its own activation point and cannot merge; every other variant is linear in x
    return Merge.IMPOSSIBLE if getattr(config, "alora_invocation_tokens", None) else Merge.EXACT


def _check(config: LoraConfig) -> None:
    check_low_rank(config.r, [config.lora_alpha], config.lora_dropout, config.rank_pattern, config.alpha_pattern)


def _identity_at_init(config: LoraConfig) -> bool:
    # False draws B too, and LoftQ changes the base; the others start with B = 0 or take out of the base what they add
    return config.init_lora_weights not in (False, "loftq")


def _trainable_parameters(config: LoraConfig, d_out: int, d_in: int) -> int:
    # use_dora trains one magnitude per output and lora_bias a bias on B
    return config.r * (d_in + d_out) + d_out * (bool(config.use_dora) + bool(config.lora_bias))


LORA = Method(
    name="lora",
    title="LoRA: low-rank adaptation",
    formula="h = W0 x + s B A x,  s = alpha / r",
    paper="LoRA (arXiv 2106.09685)",
    provided_by="peft",
    config_class=LoraConfig,
    model_class=None,
    defaults={},
    aliases={"alpha": "lora_alpha", "dropout": "lora_dropout"},
    family=lambda config: "activation space, linear",
    merge=_merge,
    identity_at_init=_identity_at_init,
    trainable_parameters=_trainable_parameters,
    cost="two thin products per layer",
    caveats=("With B = 0 the first step moves only B.",),
    check=_check,
)

QLORA = Method(
    name="qlora",
    title="QLoRA: LoRA over a frozen base in 4-bit NF4",
    formula="h = dequantise(W0) x + s B A x,  s = alpha / r",
    paper="QLoRA (arXiv 2305.14314)",
    provided_by="peft",
    config_class=LoraConfig,
    model_class=None,
    defaults={"r": 64, "lora_alpha": 16},
    aliases=LORA.aliases,
    family=LORA.family,
    merge=_merge,
    identity_at_init=_identity_at_init,
    trainable_parameters=LORA.trainable_parameters,
    required_quantization="nf4",
    cost="as LoRA, plus one dequantisation per layer and pass",
    caveats=(
        "Merging into the 4-bit base in memory quantises the sum again, which is lossy. `curvelora merge` takes the "
        "unquantised base instead, which is not quite the one of training, and measures what that changes.",
    ),
    check=_check,
)
