"""What an adapter starts from: fresh random factors, or the weight that it adapts."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from curvelora.checkpoint import unquantised_weight
from curvelora.errors import UserError
from curvelora.layers.adapter_layer import AdapterLayer
from curvelora.layers.base_weight import (
    device_of_weight,
    is_partitioned,
    is_transposed,
    offloading_hook,
    refuse_reordered_4bit,
    requantised,
    whole_weight,
)

SOURCES = ("unquantised", "dequantised")
# Relative distance of a quantised weight to the checkpoint's, quantised once more in the same way: 0 for the right one, after the
# same cast. For one that differs by 1 % it is 0.05 in NF4 and 0.014 in int8 ...
SAME_WHEN_REQUANTISED = 0.01
CASTS = (torch.float32, torch.bfloat16, torch.float16)  # in which a model may have been loaded before it was quantised
# ... and to the checkpoint's own where the quantiser cannot be asked: NF4 about 0.1, another weight of that shape 1.4.
SAME_WEIGHT = 0.3


def kaiming_A(r: int, d_in: int) -> Tensor:
    """A (r, d_in) fp32 as nn.Linear and LoRA draw it: U(-1/sqrt(d_in), 1/sqrt(d_in))."""
    return nn.init.kaiming_uniform_(torch.empty(r, d_in, dtype=torch.float32), a=math.sqrt(5))


def zero_B(d_out: int, r: int) -> Tensor:
    """B (d_out, r) fp32 zero, so that the adapter adds nothing at the start."""
    return torch.zeros(d_out, r, dtype=torch.float32)


@torch.no_grad()
def initial_weight(layer: AdapterLayer, source: str, model: nn.Module | None, revision: str | None = None) -> Tensor:
    """The weight (d_out, d_in) from which an init takes its factors, on the layer's device.

    Args:
        layer: its own weight is taken where it is a floating-point one.
        source: on a quantised layer, "unquantised" for the weight in the checkpoint of `model`, "dequantised" for what the
            quantiser left of it.
        model: the base model, which names its checkpoint.
        revision: of that checkpoint on the hub, where it is not the newest.

    Raises:
        UserError: another adapter is merged into the layer, or a quantised layer whose unquantised weight cannot be had.
    """
    base_layer = layer.get_base_layer()
    if layer.merged:
        raise UserError(
            f"the factors come from the weight of module {layer.name!r}, and adapters are merged into it "
            f"({', '.join(layer.merged_adapters)}): call model.unmerge_adapter() first"
        )
    weight = getattr(base_layer, "weight", None)
    if (hook := offloading_hook(base_layer)) is not None and layer.quantization_backend is None:
        weight = hook.weights_map["weight"].to(device_of_weight(base_layer))
    if layer.quantization_backend is None and weight is not None and weight.is_floating_point():
        return _floating_point(base_layer, weight)
    backend = layer.quantization_backend
    if backend is None or not backend.supports_merge:  # GPTQ, AWQ and others, which PEFT only runs forward
        kind = backend.backend_name if backend is not None else f"{type(base_layer).__name__}, which PEFT does not know,"
        raise UserError(
            f"module {layer.name!r} is quantised with {kind} and its factors come from the unquantised weight: this one cannot "
            "be read back, so no other can be compared with it; take another base, or an init that needs no weight"
        )
    refuse_reordered_4bit(base_layer, layer.name)
    dequantised = layer.get_base_weight()
    if source == "dequantised":
        return dequantised
    remedy = (
        "load the base from an unquantised checkpoint (it may be quantised while loading), or write "
        "svd_source: dequantised to start from the dequantised weight"
    )
    try:
        weight = unquantised_weight(model, layer.name, revision).to(dequantised.device)
    except UserError as error:
        raise UserError(
            f"module {layer.name!r} is quantised, and its factors come from the unquantised weight: {error}; {remedy}"
        ) from error
    # transformers quantises a Conv1D as the transposed linear layer
    for candidate in (weight, weight.T):
        if candidate.shape == dequantised.shape and _is_same(base_layer, dequantised.float(), candidate):
            return candidate
    raise UserError(
        f"module {layer.name!r} is quantised, and the checkpoint has another weight under its name (of shape "
        f"{' x '.join(map(str, weight.shape))}; another revision, perhaps): {remedy}"
    )


def _floating_point(base_layer: nn.Module, weight: Tensor) -> Tensor:
    """`weight` as (d_out, d_in); a copy where ZeRO-3 takes the original away again."""
    if is_partitioned(weight):
        with whole_weight(base_layer) as whole:
            weight = whole.detach().clone()
    return weight.T if is_transposed(base_layer) else weight


def _is_same(base_layer: nn.Module, dequantised: Tensor, weight: Tensor) -> bool:
    """Whether `dequantised` is what quantisation left of `weight`."""

    def within(other: Tensor, bound: float) -> bool:
        return ((other.float() - dequantised).norm() <= bound * dequantised.norm()).item()

    for dtype in CASTS:
        again = requantised(base_layer, weight.to(dtype))
        if again is None:
            return within(weight, SAME_WEIGHT)
        if within(again, SAME_WHEN_REQUANTISED):
            return True
    return False
