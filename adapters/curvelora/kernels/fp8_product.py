"""G = g^T x from operands rounded to FP8, for the part of the gradients beyond f'(0), which needs no more digits.

    g: (tokens, d_out) bf16   x: (tokens, d_in) bf16   G: (d_out, d_in) bf16

Each column of g and of x has a scale, its largest entry over 448, the largest number of E4M3 (arXiv 2209.05433). An entry of at
least 2^-14 of the largest is rounded by 2^-4 of itself at most, any other by 2^-10 of the scale. Where a column has no such small
entries beside large ones, entry by entry and before G is rounded to bf16,

    |G - g^T x| <= ROUNDING |g|^T |x|       ROUNDING = (1 + 2^-4)^2 - 1 = 0.129

In the norm it is about 3.7 %, for the roundings do not agree. Small entries add SMALL (max |g| sum |x| + sum |g| max |x|) at
most, with sums over tokens: a tenth of the above where largest entries are 2,900 times the mean ones and the sizes of g and x do
not avoid each other. Sums go to fp32 registers on the way (`use_fast_accum=False`): those of the tensor cores have about 14 bits
(arXiv 2412.19437, section 3.3.2), too few for 8,192 tokens.

The linear part of the gradients is LoRA's, and is formed as LoRA forms it (`low_rank_gradients`), from bf16. `fp8_gate` bounds
what is left. Tensor cores sum the second index of both operands, so both are written transposed, in one kernel that reads its
columns twice. Codes are made by integer arithmetic, after divisions that round to nearest: the same on every GPU and in the
interpreter.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from curvelora.kernels.portable import cdiv

LARGEST = tl.constexpr(448.0)
ROUNDING = (1 + 2**-4) ** 2 - 1
SMALL = 2**-10 / 448  # of a column's largest entry
MULTIPLE = 16  # of which the products' sizes are; beyond them there are zeros
# columns of a program, tokens a turn, warps: 16 columns of bf16 are the 32 bytes that memory is read by
TILE = (16, 512, 8)


@triton.jit
def e4m3(x):
    """The code of fp32 x, |x| <= 448, rounded to nearest, ties to even; NaN stays NaN."""
    bits = x.to(tl.uint32, bitcast=True)
    size = bits & 0x7FFFFFFF
    # from 2^-6 on: three bits of mantissa stay, and the exponent's bias is 7 instead of 127
    normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - (120 << 3)
    # below: a multiple of 2^-9, which is the last place of numbers at 2^14
    small = (tl.abs(x) + 16384.0).to(tl.uint32, bitcast=True) & 0xF
    code = tl.where(size >= 0x3C800000, normal, small)
    code = tl.where(size > 0x7F800000, 0x7F, code)
    return (code | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def _codes(out, scales, x, tokens, width, stride, padded, COLUMNS: tl.constexpr, TOKENS: tl.constexpr):
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    there = (columns < width)[None, :]
    largest = tl.zeros((COLUMNS,), tl.float32)
    for first in range(0, tokens, TOKENS):
        at = first + tl.arange(0, TOKENS)
        of_x = at.to(tl.int64)[:, None] * stride + columns[None, :]
        value = tl.load(x + of_x, (at < tokens)[:, None] & there, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.max(tl.abs(value), 0))
    scale = tl.where(largest > 0, tl.div_rn(largest, tl.full((COLUMNS,), LARGEST, tl.float32)), 1.0)
    divisor = tl.broadcast_to(scale[None, :], (TOKENS, COLUMNS))
    tl.store(scales + columns, scale, columns < width)
    for first in range(0, padded, TOKENS):
        at = first + tl.arange(0, TOKENS)
        of_x = at.to(tl.int64)[:, None] * stride + columns[None, :]
        value = tl.load(x + of_x, (at < tokens)[:, None] & there, other=0.0).to(tl.float32)
        # a quotient may be above 448 by its rounding
        value = tl.where(tl.abs(value) > 0, tl.clamp(tl.div_rn(value, divisor), -LARGEST, LARGEST), value)
        of_out = columns.to(tl.int64)[:, None] * padded + at[None, :]
        tl.store(out + of_out, tl.trans(e4m3(value)), (columns < width)[:, None] & (at < padded)[None, :])


Codes = tuple[Tensor, Tensor]


def codes_of_columns(x: Tensor, tile: tuple[int, int, int] | None = None) -> Codes:
    """((width, tokens rounded up) in E4M3, (width,) in fp32): x transposed is the codes times their row's scale.

    Args:
        x: (tokens, width), bf16, entries of a row side by side.
        tile: columns of a program, tokens a turn, warps; None: `TILE`.
    """
    (tokens, width), (columns, turn, warps) = x.shape, tile or TILE
    x = x if x.stride(1) == 1 else x.contiguous()
    padded = cdiv(tokens, MULTIPLE) * MULTIPLE
    out = torch.empty((width, padded), dtype=torch.uint8, device=x.device)
    scales = torch.empty(width, dtype=torch.float32, device=x.device)
    _codes[(cdiv(width, columns),)](out, scales, x, tokens, width, x.stride(0), padded, columns, turn, num_warps=warps)
    return out.view(torch.float8_e4m3fn), scales


def fp8_product(g: Codes, x: Codes, out: Tensor) -> Tensor:
    """Write G to `out`, bf16 and contiguous; returns it. g, x: of the columns of both; d_in is a multiple of 16."""
    return torch._scaled_mm(
        g[0], x[0].T, scale_a=g[1][:, None], scale_b=x[1][None, :], out_dtype=out.dtype, use_fast_accum=False, out=out
    )


def codes_reference(x: Tensor) -> Codes:
    """The same by PyTorch's own conversion, without zeros at the end."""
    largest = x.float().abs().amax(0)
    scales = torch.where(largest > 0, largest / LARGEST.value, 1.0)
    return (x.float() / scales).clamp(-LARGEST.value, LARGEST.value).T.to(torch.float8_e4m3fn), scales
