"""What an adapter starts from: fresh random factors, or the weight that it adapts."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from curvelora.checkpoint import unquantised_weight
from curvelora.errors import UserError
from curvelora.layers.adapter_layer import AdapterLayer
from curvelora.layers.base_weight import is_transposed, refuse_reordered_4bit

SOURCES = ("unquantised", "dequantised")
# Relative distance between a weight and its quantised form: NF4 about 0.1, int8 about 0.01; another weight of that shape 1.4.
SAME_WEIGHT = 0.3


def kaiming_A(r: int, d_in: int) -> Tensor:
    """A (r, d_in) fp32 as nn.Linear and LoRA draw it: U(-1/sqrt(d_in), 1/sqrt(d_in))."""
    return nn.init.kaiming_uniform_(torch.empty(r, d_in, dtype=torch.float32), a=math.sqrt(5))


def zero_B(d_out: int, r: int) -> Tensor:
    """B (d_out, r) fp32 zero, so that the adapter adds nothing at the start."""
    return torch.zeros(d_out, r, dtype=torch.float32)


@torch.no_grad()
def initial_weight(layer: AdapterLayer, source: str, model: nn.Module | None) -> Tensor:
    """The weight (d_out, d_in) from which an init takes its factors, on the layer's device.

    Args:
        layer: its own weight is taken where it is a floating-point one.
        source: on a quantised layer, "unquantised" for the weight in the checkpoint of `model`, "dequantised" for what the
            quantiser left of it.
        model: the base model, which names its checkpoint.

    Raises:
        UserError: a quantised layer whose unquantised weight cannot be had.
    """
    base_layer = layer.get_base_layer()
    if layer.quantization_backend is None and base_layer.weight.is_floating_point():
        return base_layer.weight.T if is_transposed(base_layer) else base_layer.weight
    refuse_reordered_4bit(base_layer, layer.name)
    dequantised = layer.get_base_weight()
    if source == "dequantised":
        return dequantised
    remedy = (
        "load the base from an unquantised checkpoint (it may be quantised while loading), or write "
        "svd_source: dequantised to start from the dequantised weight"
    )
    try:
        weight = unquantised_weight(model, layer.name).to(dequantised.device)
    except UserError as error:
        raise UserError(
            f"module {layer.name!r} is quantised, and its factors come from the unquantised weight: {error}; {remedy}"
        ) from error
    # transformers quantises a Conv1D as the transposed linear layer
    for candidate in (weight, weight.T):
        if candidate.shape == dequantised.shape:
            difference = (candidate.float() - dequantised.float()).norm() / dequantised.float().norm()
            if difference < SAME_WEIGHT:
                return candidate
    raise UserError(
        f"module {layer.name!r} is quantised, and the checkpoint has another weight under its name (of shape "
        f"{' x '.join(map(str, weight.shape))}): {remedy}"
    )
