"""FourierFT, PEFT's own: the update is the inverse Fourier transform of a spectrum with few trained entries."""

from __future__ import annotations

from typing import Any

from peft import FourierFTConfig

from curvelora.errors import UserError
from curvelora.merging import Merge
from curvelora.method import Method
from curvelora.tuner import is_number


def _check(config: FourierFTConfig) -> None:
    numbers: list[Any] = [config.n_frequency]
    if isinstance(config.n_frequency_pattern or {}, dict):
        numbers += (config.n_frequency_pattern or {}).values()
    else:
        raise UserError(
            f"n_frequency_pattern must map module names to numbers, not be {config.n_frequency_pattern!r}: "
            "write for example n_frequency_pattern: {q_proj: 500}"
        )
    for number in numbers:
        if not isinstance(number, int) or isinstance(number, bool) or number < 1:
            raise UserError(
                f"n_frequency must be a whole number of at least 1, not {number!r}: write for example n_frequency=1000"
            )
    if not is_number(config.scaling) or config.scaling <= 0:
        raise UserError(f"scaling must be a positive number, not {config.scaling!r}: the update is scaled by it")
    if not isinstance(config.random_loc_seed, int):
        raise UserError(
            f"random_loc_seed must be a whole number, not {config.random_loc_seed!r}: the positions are drawn with it, "
            "and loading draws them again"
        )


METHOD = Method(
    name="fourierft",
    title="FourierFT: a sparse spectrum of the update",
    formula="h = W0 x + s Re(ifft2(F)) x,  F zero but for n trained entries at fixed random positions",
    paper="FourierFT (arXiv 2405.03003)",
    provided_by="peft",
    config_class=FourierFTConfig,
    model_class=None,
    defaults={},
    internal_options=("fan_in_fan_out",),
    family=lambda config: "weight space",
    merge=lambda config: Merge.EXACT,
    identity_at_init=lambda config: bool(config.init_weights),
    trainable_parameters=lambda config, d_out, d_in: config.n_frequency,
    cost="a two-dimensional inverse FFT and a dense product with the update per layer and pass",
    caveats=(
        "The untrained adapter changes the model: PEFT draws the spectrum from N(0, 1), as the paper does; "
        "`init_weights: true` starts from zeros and so from the base.",
        "It has neither a rank nor alpha nor dropout: `n_frequency` entries a layer, whatever its shape, times `scaling`.",
        "`scaling` goes with the task: 150 is PEFT's default, the authors took 29 to 151 for GLUE and 300 for ViT and "
        "LLaMA, with learning rates far above LoRA's.",
        "The positions come from `random_loc_seed` alone, so layers of equal shape share theirs; PEFT's seed is 777 and "
        "the authors' is 2024.",
        "PEFT computes the update in fp32 whatever the dtype of the layer, and merges it into an unquantised base only; "
        "it trains on NF4 and int8.",
        "PEFT ignores `adapter_names` here: rows cannot have adapters of their own.",
    ),
    check=_check,
)
