"""ZeRO-3: the frozen base is held in shares over the processes, each layer gathered when it is needed and given back.

Adapters are a hundredth of it and are kept whole on every process (their gradients and moments stay sharded): they can be saved,
measured and logged as with any other engine. The base is loaded into shares, tensor by tensor; only one that is quantised while
loading is whole on every process first, as transformers has no other way.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers import TrainingArguments
from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config

from curvelora.errors import UserError
from curvelora.layers.weight_product import reads_weight
from curvelora_eval.spec import ModelSpec

THRESHOLD = "stage3_param_persistence_threshold"


def stage_of(settings: dict[str, Any] | None) -> int | None:
    """The ZeRO stage that a DeepSpeed configuration asks for; None without one."""
    return None if settings is None else settings["zero_optimization"]["stage"]


def keep_adapters_whole(settings: dict[str, Any], shapes: nn.Module) -> None:
    """Set the size up to which parameters stay whole so that every trainable one does.

    Args:
        settings: the DeepSpeed configuration, changed in place.
        shapes: the model with its adapter.

    Raises:
        UserError: the configuration says a smaller size itself.
    """
    largest = max((p.numel() for p in shapes.parameters() if p.requires_grad), default=0)
    zero = settings["zero_optimization"]
    asked = zero.get(THRESHOLD, "auto")
    if asked != "auto" and asked < largest:
        raise UserError(
            f"{THRESHOLD} is {asked} in the DeepSpeed configuration, and an adapter of this run has a tensor of {largest} "
            "entries, which has to stay whole on every process: leave the key out"
        )
    if asked == "auto":
        zero[THRESHOLD] = largest


@contextlib.contextmanager
def loading_into_shares(arguments: TrainingArguments, spec: ModelSpec) -> Iterator[None]:
    """Inside, transformers loads the base into shares of its dtype; one that is quantised while loading comes whole.

    DeepSpeed takes the dtype from the configuration's half-precision section, which this project leaves out (it would store the
    adapters in it, too), and would make a bf16 base fp32. So the section is there while weights are loaded. With a quantised base
    transformers must not know of ZeRO-3: it refuses the device that bitsandbytes needs, and the engine takes the shares later.
    """
    if spec.quantization != "none":
        unset_hf_deepspeed_config()
        try:
            yield
        finally:
            set_hf_deepspeed_config(arguments.hf_deepspeed_config)
        return
    config = arguments.hf_deepspeed_config.config
    config["bf16"] = {"enabled": spec.dtype == "bfloat16"}
    try:
        yield
    finally:
        del config["bf16"]


def share_held(model: nn.Module) -> float:
    """The part of the frozen base that this process holds, once the engine has it: 1 without ZeRO-3."""
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    held = sum(getattr(p, "ds_tensor", p).numel() for p in frozen)
    return held / max(1, sum(getattr(p, "ds_numel", p.numel()) for p in frozen))


def gather_for_readers(model: nn.Module) -> None:
    """Tell DeepSpeed which adapters read the weight under them, so that it is there in their forward and backward passes."""
    from deepspeed.runtime.zero.partition_parameters import register_external_parameter

    for module in model.modules():
        if reads_weight(module):
            register_external_parameter(module, module.get_base_layer().weight)
