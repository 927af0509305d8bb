"""What FP8's path makes of g and x in two readings of each: their codes, and LoRA's gradients for the part of f'(0).

    back = c g B      down = c x A^T       c = s f'(0)      (tokens, r) bf16: first readings, with columns' largest entries
    dL/dA = back^T x  dL/dB = g^T down                      fp32: second readings, which write the codes (`fp8_product`)

`low_rank_gradients` makes these by four thin products that read g and x twice each, as do `codes_of_columns`; here a product
rides on every reading that is made anyway. What is rounded where is the same.

In a first reading a program has some tokens and walks over all columns, each program from another one on: all of them write the
largest entries that they find to one place, as whole numbers by `atomic_max`, whose result knows no order. In a second reading a
program has some columns and a span of tokens, and keeps its part of the product in registers; the parts are summed with those
of `factor_gradients`. Traffic: 2 bytes an entry, then 2 and 1 for the code; factors and thin matrices come from the cache. One
launch reads both matrices, so that one's last programs run beside the other's first.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from curvelora.kernels.fp8_product import MULTIPLE, Codes, scale_of
from curvelora.kernels.launch import launch
from curvelora.kernels.merged_weight import padded_rank
from curvelora.kernels.portable import cdiv, dot, to_bf16, to_e4m3

Tile = tuple[int, ...]
# tokens and columns of a tile, warps, stages
FIRST_TILE = (64, 128, 4, 3)
# tokens and columns of a tile, programs to aim at, warps, stages
SECOND_TILE = (64, 128, 264, 4, 3)
# at twice the rank those would take more than 99 KiB of shared memory, and more registers than RTX 40 has
WIDE_FIRST_TILE = (64, 64, 4, 3)
WIDE_SECOND_TILE = (64, 64, 264, 4, 3)


@triton.jit
def _first(
    thin, largest, x, factor, program, tokens, width, rank, stride, by_column, by_rank,
    RANK: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    at = program * TOKENS + tl.arange(0, TOKENS)
    inside = at < tokens
    ranks = tl.arange(0, RANK)
    of_rank = ranks < rank
    sums = tl.zeros((RANK, TOKENS), tl.float32)
    turns = tl.cdiv(width, COLUMNS)
    for turn in range(turns):
        columns = (turn + program) % turns * COLUMNS + tl.arange(0, COLUMNS)
        there = columns < width
        of_x = at.to(tl.int64)[:, None] * stride + columns[None, :]
        value = tl.load(x + of_x, inside[:, None] & there[None, :], other=0.0)
        of_factor = ranks[:, None] * by_rank + columns[None, :] * by_column
        part = tl.load(factor + of_factor, of_rank[:, None] & there[None, :], other=0.0)
        sums = dot(part, tl.trans(value), sums)
        size = tl.max(value.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0)
        tl.atomic_max(largest + columns, size, there, sem="relaxed")
    tl.store(thin + at[None, :] * rank + ranks[:, None], to_bf16(sums), inside[None, :] & of_rank[:, None])


@triton.jit
def _first_readings(
    back, down, largest_g, largest_x, g, x, A, B, tokens, d_out, d_in, rank, stride_g, stride_x,
    RANK: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    of_g = tl.cdiv(tokens, TOKENS)
    if program < of_g:
        _first(back, largest_g, g, B, program, tokens, d_out, rank, stride_g, rank, 1, RANK, TOKENS, COLUMNS)
    else:
        program -= of_g
        _first(down, largest_x, x, A, program, tokens, d_in, rank, stride_x, 1, d_in, RANK, TOKENS, COLUMNS)


@triton.jit
def _second(
    codes, scales, parts, largest, x, thin, program, tokens, width, rank, stride, padded, span, by_column, by_rank,
    RANK: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(width, COLUMNS)
    columns = program % blocks * COLUMNS + tl.arange(0, COLUMNS)
    there = columns < width
    ranks = tl.arange(0, RANK)
    of_rank = ranks < rank
    scale, inverse = scale_of(tl.load(largest + columns, there, other=0).to(tl.float32, bitcast=True))
    if program < blocks:
        tl.store(scales + columns, scale, there)
    sums = tl.zeros((RANK, COLUMNS), tl.float32)
    start = program // blocks * span
    for first in range(start, tl.minimum(start + span, padded), TOKENS):
        at = first + tl.arange(0, TOKENS)
        inside = at < tokens
        of_x = at.to(tl.int64)[:, None] * stride + columns[None, :]
        value = tl.load(x + of_x, inside[:, None] & there[None, :], other=0.0)
        part = tl.load(thin + at[:, None] * rank + ranks[None, :], inside[:, None] & of_rank[None, :], other=0.0)
        sums = dot(tl.trans(part), value, sums)
        code = tl.trans(to_e4m3(value.to(tl.float32) * inverse[None, :]))
        of_codes = columns.to(tl.int64)[:, None] * padded + at[None, :]
        tl.store(codes + of_codes, code, there[:, None] & (at < padded)[None, :])
    of_parts = program // blocks * width * rank + ranks[:, None] * by_rank + columns[None, :] * by_column
    tl.store(parts + of_parts, sums, of_rank[:, None] & there[None, :])


@triton.jit
def _second_readings(
    codes_g, codes_x, scales_g, scales_x, parts_B, parts_A, largest_g, largest_x, g, x, down, back,
    tokens, d_out, d_in, rank, stride_g, stride_x, padded, span, spans,
    RANK: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    of_g = tl.cdiv(d_out, COLUMNS) * spans
    if program < of_g:
        _second(
            codes_g, scales_g, parts_B, largest_g, g, down, program, tokens, d_out, rank, stride_g, padded, span, rank, 1,
            RANK, TOKENS, COLUMNS,
        )  # fmt: skip
    else:
        _second(
            codes_x, scales_x, parts_A, largest_x, x, back, program - of_g, tokens, d_in, rank, stride_x, padded, span, 1, d_in,
            RANK, TOKENS, COLUMNS,
        )  # fmt: skip


def tiles_for(rank: int) -> tuple[Tile, Tile]:
    """The tiles of first and second readings for factors of this rank."""
    return (FIRST_TILE, SECOND_TILE) if rank <= 64 else (WIDE_FIRST_TILE, WIDE_SECOND_TILE)


def first_readings(
    g: Tensor, x: Tensor, A: Tensor, B: Tensor, of_x: bool = True, tile: Tile | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(g B, x A^T, largest): products are (tokens, r) bf16; largest, (d_out + d_in,) int32, has the bits of fp32 numbers.

    The largest entries of g's columns stand before those of x's.

    Args:
        g: (tokens, d_out), bf16, entries of a row side by side.
        x: (tokens, d_in), bf16, entries of a row side by side.
        A, B: (r, d_in) and (d_out, r), bf16, contiguous.
        of_x: whether x is read; else its product has no entries, and its largest entries are zeros.
        tile: tokens and columns of a tile, warps, stages; None: of `tiles_for`.
    """
    (tokens, d_out), (rank, d_in) = g.shape, A.shape
    turn, columns, warps, stages = tile or tiles_for(rank)[0]
    back, down = (torch.empty((rows, rank), dtype=g.dtype, device=g.device) for rows in (tokens, of_x * tokens))
    largest = torch.zeros(d_out + d_in, dtype=torch.int32, device=g.device)
    launch(
        _first_readings, (cdiv(tokens, turn) * (1 + of_x),), back, down, largest, largest[d_out:], g, x, A, B,
        tokens, d_out, d_in, rank, g.stride(0), x.stride(0), padded_rank(rank), turn, columns,
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return back, down, largest


def second_readings(
    g: Tensor, x: Tensor, back: Tensor, down: Tensor, largest: Tensor, of_x: bool = True, tile: Tile | None = None
) -> tuple[Codes, Codes, Tensor, Tensor]:
    """(codes of g, codes of x, parts of back^T x, parts of g^T down): (n, r, d_in) and (n, d_out, r), fp32, to be summed over n.

    Args:
        g: (tokens, d_out), bf16, entries of a row side by side.
        x: (tokens, d_in), bf16, entries of a row side by side.
        back, down: (tokens, r), bf16, contiguous.
        largest: from `first_readings`.
        of_x: whether x is read; else what is made of it has no entries.
        tile: tokens and columns of a tile, programs to aim at, warps, stages; None: of `tiles_for`.
    """
    (tokens, d_out), d_in, rank = g.shape, x.shape[1], back.shape[1]
    turn, columns, programs, warps, stages = tile or tiles_for(rank)[1]
    padded = cdiv(tokens, MULTIPLE) * MULTIPLE
    blocks = cdiv(d_out, columns) + of_x * cdiv(d_in, columns)
    span = cdiv(cdiv(padded, max(1, programs // blocks)), turn) * turn
    spans = cdiv(padded, span)
    codes = [torch.empty((width, padded), dtype=torch.float8_e4m3fn, device=g.device) for width in (d_out, of_x * d_in)]
    scales = [torch.empty(width, dtype=torch.float32, device=g.device) for width in (d_out, of_x * d_in)]
    parts_A = torch.empty((spans, rank, of_x * d_in), dtype=torch.float32, device=g.device)
    parts_B = torch.empty((spans, d_out, rank), dtype=torch.float32, device=g.device)
    launch(
        _second_readings, (blocks * spans,), *codes, *scales, parts_B, parts_A, largest, largest[d_out:], g, x, down, back,
        tokens, d_out, d_in, rank, g.stride(0), x.stride(0), padded, span, spans, padded_rank(rank), turn, columns,
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return (codes[0], scales[0]), (codes[1], scales[1]), parts_A, parts_B
