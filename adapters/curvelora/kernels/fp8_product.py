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

The linear part of the gradients is LoRA's, and is formed as LoRA forms it (`low_rank_gradients`), from bf16. `fp8_gate` bounds
what is left. Tensor cores sum the second index of both operands, so both are written transposed. One kernel reads all for the
largest entries of parts of columns, the other takes the largest of those, scales and transposes: 5 bytes an entry, and what each
tile reads of the parts, from the cache: a byte an entry at 8,192 tokens.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from curvelora.kernels.launch import launch
from curvelora.kernels.portable import cdiv, to_e4m3

ROUNDING = (1 + 2**-4) ** 2 - 1
SMALL = 2**-9 / 448  # of a column's largest entry
MULTIPLE = 16  # of which the products' sizes are; beyond them there are zeros
# columns and tokens of a tile, warps (`curvelora bench kernels`, H200)
TILE = (64, 128, 4)
# of the search for the largest entries: columns and tokens of a program, tokens a turn, warps
LARGEST_TILE = (128, 256, 64, 4)


@triton.jit
def scale_of(largest):
    """(scale, 1 / scale) of columns with these largest entries; 1 where there is none, or a NaN."""
    # 448 is 1.75 2^8: a mantissa above 1.75 takes the next power. No power is below the smallest normal number
    power = ((largest.to(tl.uint32, bitcast=True) + 0x1FFFFF) >> 23).to(tl.int32) - 8
    power = tl.where(largest > 0, tl.maximum(power, 1), 127)
    return (power << 23).to(tl.float32, bitcast=True), ((254 - power) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _largest(out, x, tokens, width, stride, COLUMNS: tl.constexpr, TOKENS: tl.constexpr, TURN: tl.constexpr):
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    there = columns < width
    largest = tl.zeros((TURN, COLUMNS), tl.float32)
    start = tl.program_id(1) * TOKENS
    for first in range(start, start + TOKENS, TURN):
        at = first + tl.arange(0, TURN)
        of_x = at.to(tl.int64)[:, None] * stride + columns[None, :]
        value = tl.load(x + of_x, (at < tokens)[:, None] & there[None, :], other=0.0)
        largest = tl.maximum(largest, tl.abs(value.to(tl.float32)))
    tl.store(out + tl.program_id(1) * width + columns, tl.max(largest, 0), there)


@triton.jit
def _codes(
    out, scales, parts, x, tokens, width, stride, padded, chunks,
    CHUNKS: tl.constexpr, COLUMNS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    there = columns < width
    part = tl.arange(0, CHUNKS)
    of_parts = part[:, None] * width + columns[None, :]
    largest = tl.max(tl.load(parts + of_parts, (part < chunks)[:, None] & there[None, :], other=0.0), 0)
    scale, inverse = scale_of(largest)
    if tl.program_id(1) == 0:
        tl.store(scales + columns, scale, there)
    at = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    of_x = at.to(tl.int64)[:, None] * stride + columns[None, :]
    value = tl.load(x + of_x, (at < tokens)[:, None] & there[None, :], other=0.0)
    code = to_e4m3(tl.trans(value).to(tl.float32) * inverse[:, None])
    of_out = columns.to(tl.int64)[:, None] * padded + at[None, :]
    tl.store(out + of_out, code, there[:, None] & (at < padded)[None, :])


Codes = tuple[Tensor, Tensor]


def codes_of_columns(x: Tensor, tile: tuple[int, int, int] | None = None) -> Codes:
    """((width, tokens rounded up) in E4M3, (width,) in fp32): x transposed is the codes times their row's scale.

    Args:
        x: (tokens, width), bf16, entries of a row side by side.
        tile: columns and tokens of a tile, warps; None: `TILE`.
    """
    (tokens, width), (columns, turn, warps) = x.shape, tile or TILE
    x = x if x.stride(1) == 1 else x.contiguous()
    wide, long, short, few = LARGEST_TILE
    chunks, padded = cdiv(tokens, long), cdiv(tokens, MULTIPLE) * MULTIPLE
    parts = torch.empty((chunks, width), dtype=torch.float32, device=x.device)
    launch(
        _largest, (cdiv(width, wide), chunks), parts, x, tokens, width, x.stride(0), wide, long, short, num_warps=few
    )
    out = torch.empty((width, padded), dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty(width, dtype=torch.float32, device=x.device)
    launch(
        _codes, (cdiv(width, columns), cdiv(padded, turn)), out, scales, parts, x, tokens, width, x.stride(0), padded, chunks,
        triton.next_power_of_2(chunks), columns, turn, num_warps=warps,
    )  # fmt: skip
    return out, scales


def fp8_product(g: Codes, x: Codes, out: Tensor) -> Tensor:
    """Write G to `out`, bf16 and contiguous; returns it. g, x: of the columns of both; d_in is a multiple of 16."""
    return torch._scaled_mm(
        g[0], x[0].T, scale_a=g[1][:, None], scale_b=x[1][None, :], out_dtype=out.dtype, use_fast_accum=False, out=out
    )


def codes_reference(x: Tensor) -> Codes:
    """The same by PyTorch's own conversion, without zeros at the end."""
    largest = x.double().abs().amax(0)
    scales = torch.where(largest > 0, 2 ** torch.ceil(torch.log2(largest / 448)), 1.0)
    return (x.double() / scales).float().T.to(torch.float8_e4m3fn), scales.float()
