"""Full fine-tuning of the adapted layers: the reference whose update the adapters approximate."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from curvelora.precision import compute_dtype


class FullLinear(nn.Module):
    """A linear layer whose own weight trains, kept in fp32 and rounded to the compute dtype for the product.

    Args:
        weight: (d_out, d_in), what training starts from; for a quantised base its dequantised weight, so that this arm starts
            from the same function as all others.
        bias: (d_out,) or None, frozen.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.weight = nn.Parameter(weight.float().clone())
        self.register_buffer("initial_weight", weight.detach().clone(), persistent=False)
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., d_in) -> (..., d_out)."""
        dtype = compute_dtype(x)
        bias = None if self.bias is None else self.bias.to(dtype)
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.to(dtype), self.weight.to(dtype), bias)
