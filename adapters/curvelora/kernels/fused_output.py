"""Which fused product a layer's pass is."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from curvelora.kernels.fp8_gate import Asked
from curvelora.kernels.merged_linear import merged_linear
from curvelora.kernels.nf4 import codes_of, lies_between_numbers
from curvelora.kernels.separate_linear import separate_linear
from curvelora.layers.dense_delta import DeltaMap


def fused_output(
    base_layer: nn.Module, x: Tensor, A: Tensor, B: Tensor, delta_map: DeltaMap, p: float = 0.0, fp8: Asked | None = None
) -> Tensor:
    """x W0^T + bias + drop(x) (s f(BA))^T: (..., d_out), in bf16 on an `nn.Linear`, else in the dtype of x, as their own passes.

    Args:
        base_layer: one that `choice.why_not` lets pass.
        x: (..., d_in).
        A, B: factors, (r, d_in) and (d_out, r), fp32.
        p: the probability with which an entry of x is dropped, in [0, 1).
        fp8: from `fp8_gate.asked`, or None.
    """
    bias = base_layer.bias if base_layer.bias is None else base_layer.bias.to(torch.bfloat16)
    in_bf16 = type(base_layer) is nn.Linear  # which leaves its output in bf16 under autocast
    base = [base_layer.weight] if in_bf16 else codes_of(base_layer)
    on_numbers = in_bf16 or not lies_between_numbers(base_layer)
    # LoRA's two thin products cost about as much as to merge and dither, and with few tokens far less
    if p or (on_numbers and delta_map.activation.name == "identity"):
        found = separate_linear(x, A, B, bias, base, delta_map, p, fp8)
    else:
        found = merged_linear(x, A, B, bias, base, delta_map, fp8, dithered=on_numbers)
    return found if in_bf16 else found.to(x.dtype)
