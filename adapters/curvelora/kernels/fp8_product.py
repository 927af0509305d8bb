"""G = g^T x from operands rounded to FP8, for the part of the gradients beyond f'(0), which needs no more digits.

    g: (tokens, d_out) bf16   x: (tokens, d_in) bf16   G: (d_out, d_in) bf16

Each column of g and of x has a scale, the smallest power of two that brings its largest entry to 448 or less, the largest
number of E4M3 (arXiv 2209.05433): a power of two scales without rounding and takes no division. An entry of at least 2^-13 of
the largest is rounded by 2^-4 of itself at most, any other by 2^-10 of the scale. Where a column has no such small entries beside
large ones, entry by entry and before G is rounded to bf16,

    |G - g^T x| <= ROUNDING |g|^T |x|       ROUNDING = (1 + 2^-4)^2 - 1 = 0.129

In the norm it is about 3.7 %, for the roundings do not agree. Small entries add SMALL (max |g| sum |x| + sum |g| max |x|) at
most, with sums over tokens: a tenth of the above where largest entries are 1,500 times the mean ones and the sizes of g and x do
not avoid each other. Sums go to fp32 registers on the way (`use_fast_accum=False`): those of the tensor cores have about 14 bits
(arXiv 2412.19437, section 3.3.2), too few for 8,192 tokens.

The linear part of the gradients is LoRA's, and is formed as LoRA forms it, from bf16. `fp8_gate` bounds what is left. Tensor
cores sum the second index of both operands, so both are written transposed (`fp8_readings`).
"""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDING = (1 + 2**-4) ** 2 - 1
SMALL = 2**-9 / 448  # of a column's largest entry
MULTIPLE = 16  # of which the products' sizes are; beyond them there are zeros

# ((width, tokens rounded up to `MULTIPLE`) in E4M3, (width,) in fp32): x transposed is the codes times their row's scale
Codes = tuple[Tensor, Tensor]


def fp8_product(g: Codes, x: Codes, out: Tensor) -> Tensor:
    """Write G to `out`, bf16 and contiguous; returns it. g, x: codes of their columns; d_in is a multiple of 16."""
    return torch._scaled_mm(
        g[0], x[0].T, scale_a=g[1][:, None], scale_b=x[1][None, :], out_dtype=out.dtype, use_fast_accum=False, out=out
    )
