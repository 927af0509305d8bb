"""What FP8's path makes of g and x in two readings of each: their codes, and LoRA's gradients for the part of f'(0).

    back = c g B      down = c x A^T       c = s f'(0)      (tokens, r) bf16: first readings, with columns' largest entries
    dL/dA = back^T x  dL/dB = g^T down                      fp32: second readings, which write the codes (`fp8_product`)

`low_rank_gradients` makes the same gradients, rounded in the same places, by four thin products; here one rides on every reading
that codes need anyway.

In a first reading a program has some tokens and some tiles of columns. Its part of a thin product stays in registers; the parts
are summed, scaled and rounded by a small kernel, in one order. Largest entries go to one place as whole numbers by `atomic_max`,
whose result knows no order. In a second reading a program has some columns and a span of tokens, and keeps its part of a gradient
in registers; those are summed with the parts of `factor_gradients`. Traffic: 2 bytes an entry, then 2 and 1 for the code; the
factors come from the cache, a quarter as many bytes as x with 256 tokens a program; parts are 4 r bytes a token and split. One
launch reads both matrices, so that one's last programs run beside the other's first.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from curvelora.kernels.fp8_product import MULTIPLE, Codes
from curvelora.kernels.launch import launch
from curvelora.kernels.merged_weight import padded_rank
from curvelora.kernels.portable import add_parts, cdiv, dot, to_bf16, to_e4m3
from curvelora.kernels.rounded_factors import rounded_factors

Tile = tuple[int, ...]
# tokens and columns of a tile, programs to aim at, warps, stages (compared on an H200: docs/decisions.md, 8)
FIRST_TILE = (256, 64, 264, 4, 3)
SECOND_TILE = (64, 128, 264, 4, 3)
# at twice the rank those would take more than 99 KiB of shared memory, and more registers than RTX 40 has
WIDE_FIRST_TILE = (128, 64, 264, 8, 3)
WIDE_SECOND_TILE = (64, 64, 264, 4, 3)
THIN_TILE = (4, 512)  # parts a turn, and entries of a program, of the sums of thin products


@triton.jit
def _first(
    parts, largest, x, factor, program, splits, tokens, width, rank, stride, by_column, by_rank,
    RANK: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(tokens, TOKENS)
    at = program % blocks * TOKENS + tl.arange(0, TOKENS)
    inside = at < tokens
    ranks = tl.arange(0, RANK)
    of_rank = ranks < rank
    sums = tl.zeros((RANK, TOKENS), tl.float32)
    tiles = tl.cdiv(width, COLUMNS)
    split = program // blocks
    for tile in range(tiles * split // splits, tiles * (split + 1) // splits):
        columns = tile * COLUMNS + tl.arange(0, COLUMNS)
        there = columns < width
        of_x = at.to(tl.int64)[:, None] * stride + columns[None, :]
        value = tl.load(x + of_x, inside[:, None] & there[None, :], other=0.0)
        of_factor = ranks[:, None] * by_rank + columns[None, :] * by_column
        part = tl.load(factor + of_factor, of_rank[:, None] & there[None, :], other=0.0)
        sums = dot(part, tl.trans(value), sums)
        size = tl.max(value.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0)
        tl.atomic_max(largest + columns, size, there, sem="relaxed")
    of_parts = (split.to(tl.int64) * tokens + at[None, :]) * rank + ranks[:, None]
    tl.store(parts + of_parts, sums, inside[None, :] & of_rank[:, None])


@triton.jit
def _first_readings(
    parts_g, parts_x, largest_g, largest_x, g, x, A, B,
    tokens, d_out, d_in, rank, stride_g, stride_x, splits_g, splits_x,
    RANK: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    of_g = tl.cdiv(tokens, TOKENS) * splits_g
    if program < of_g:
        _first(
            parts_g, largest_g, g, B, program, splits_g, tokens, d_out, rank, stride_g, rank, 1, RANK, TOKENS, COLUMNS
        )
    else:
        program -= of_g
        _first(
            parts_x, largest_x, x, A, program, splits_x, tokens, d_in, rank, stride_x, 1, d_in, RANK, TOKENS, COLUMNS
        )


@triton.jit
def _thin(back, down, parts_g, parts_x, size, count_g, count_x, scale, TURN: tl.constexpr, BLOCK: tl.constexpr):
    """Both products of the first readings: scaled sums of their parts, rounded once."""
    programs = tl.cdiv(size, BLOCK)
    program = tl.program_id(0)
    at = program % programs * BLOCK + tl.arange(0, BLOCK)
    there = at < size
    total = tl.zeros((BLOCK,), tl.float32)
    if program < programs:
        tl.store(back + at, to_bf16(scale * add_parts(total, parts_g, at, there, count_g, size, TURN)), there)
    else:
        tl.store(down + at, to_bf16(scale * add_parts(total, parts_x, at, there, count_x, size, TURN)), there)


@triton.jit
def _scale_of(largest):
    """(scale, 1 / scale) of columns with these largest entries; 1 where there is none, or a NaN."""
    # 448 is 1.75 2^8: a mantissa above 1.75 takes the next power. No power is below the smallest normal number
    power = ((largest.to(tl.uint32, bitcast=True) + 0x1FFFFF) >> 23).to(tl.int32) - 8
    power = tl.where(largest > 0, tl.maximum(power, 1), 127)
    return (power << 23).to(tl.float32, bitcast=True), ((254 - power) << 23).to(tl.float32, bitcast=True)


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
    scale, inverse = _scale_of(tl.load(largest + columns, there, other=0).to(tl.float32, bitcast=True))
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
    of_x = tl.cdiv(d_in, COLUMNS) * spans
    if program < of_x:  # what the first readings read last, part of which may still be in the cache
        _second(
            codes_x, scales_x, parts_A, largest_x, x, back, program, tokens, d_in, rank, stride_x, padded, span, 1, d_in,
            RANK, TOKENS, COLUMNS,
        )  # fmt: skip
    else:
        _second(
            codes_g, scales_g, parts_B, largest_g, g, down, program - of_x, tokens, d_out, rank, stride_g, padded, span, rank, 1,
            RANK, TOKENS, COLUMNS,
        )  # fmt: skip


def tiles_for(rank: int) -> tuple[Tile, Tile]:
    """The tiles of first and second readings for factors of this rank."""
    return (FIRST_TILE, SECOND_TILE) if rank <= 64 else (WIDE_FIRST_TILE, WIDE_SECOND_TILE)


def first_readings(
    g: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: float = 1.0, tile: Tile | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(scale g B, scale x A^T, largest): products are (tokens, r) bf16; largest is (d_out + d_in,) int32.

    It has the bits of fp32 numbers, the largest entries of g's columns before those of x's.

    Args:
        g: (tokens, d_out), bf16, entries of a row side by side.
        x: (tokens, d_in), bf16, entries of a row side by side.
        A, B: factors, (r, d_in) and (d_out, r), which are rounded to bf16.
        scale: c.
        tile: tokens and columns of a tile, programs to aim at, warps, stages; None: of `tiles_for`.
    """
    (tokens, d_out), (rank, d_in) = g.shape, A.shape
    turn, columns, programs, warps, stages = tile or tiles_for(rank)[0]
    blocks = cdiv(tokens, turn)
    splits = max(2, programs // blocks)
    of_g = min(max(1, round(splits * d_out / (d_out + d_in))), splits - 1)
    splits_g, splits_x = min(of_g, cdiv(d_out, columns)), min(splits - of_g, cdiv(d_in, columns))
    parts_g, parts_x = (
        torch.empty((each, tokens, rank), dtype=torch.float32, device=g.device) for each in (splits_g, splits_x)
    )
    largest = torch.empty(d_out + d_in, dtype=torch.int32, device=g.device)
    A, B = rounded_factors(A, B, largest)
    launch(
        _first_readings, (blocks * (splits_g + splits_x),), parts_g, parts_x, largest, largest[d_out:], g, x, A, B,
        tokens, d_out, d_in, rank, g.stride(0), x.stride(0), splits_g, splits_x, padded_rank(rank), turn, columns,
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    back, down = (torch.empty((tokens, rank), dtype=g.dtype, device=g.device) for _ in range(2))
    launch(
        _thin, (2 * cdiv(tokens * rank, THIN_TILE[1]),), back, down, parts_g, parts_x,
        tokens * rank, len(parts_g), len(parts_x), scale, *THIN_TILE,
    )  # fmt: skip
    return back, down, largest


def second_readings(
    g: Tensor, x: Tensor, back: Tensor, down: Tensor, largest: Tensor, tile: Tile | None = None
) -> tuple[Codes, Codes, Tensor, Tensor]:
    """(codes of g, codes of x, parts of back^T x, parts of g^T down): (n, r, d_in) and (n, d_out, r), fp32, to be summed over n.

    Args:
        g: (tokens, d_out), bf16, entries of a row side by side.
        x: (tokens, d_in), bf16, entries of a row side by side.
        back, down: (tokens, r), bf16, contiguous.
        largest: from `first_readings`.
        tile: tokens and columns of a tile, programs to aim at, warps, stages; None: of `tiles_for`.
    """
    (tokens, d_out), d_in, rank = g.shape, x.shape[1], back.shape[1]
    turn, columns, programs, warps, stages = tile or tiles_for(rank)[1]
    padded = cdiv(tokens, MULTIPLE) * MULTIPLE
    blocks = cdiv(d_out, columns) + cdiv(d_in, columns)
    span = cdiv(cdiv(padded, max(1, programs // blocks)), turn) * turn
    spans = cdiv(padded, span)
    codes = [torch.empty((width, padded), dtype=torch.float8_e4m3fn, device=g.device) for width in (d_out, d_in)]
    scales = [torch.empty(width, dtype=torch.float32, device=g.device) for width in (d_out, d_in)]
    parts_A = torch.empty((spans, rank, d_in), dtype=torch.float32, device=g.device)
    parts_B = torch.empty((spans, d_out, rank), dtype=torch.float32, device=g.device)
    launch(
        _second_readings, (blocks * spans,), *codes, *scales, parts_B, parts_A, largest, largest[d_out:], g, x, down, back,
        tokens, d_out, d_in, rank, g.stride(0), x.stride(0), padded, span, spans, padded_rank(rank), turn, columns,
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return (codes[0], scales[0]), (codes[1], scales[1]), parts_A, parts_B


def codes_reference(x: Tensor) -> Codes:
    """The codes of x by PyTorch's own conversion, without zeros at the end."""
    part, power = torch.frexp(x.double().abs().amax(0) / 448)  # exact, where a GPU's logarithm is not
    scales = torch.where(part > 0, 2.0 ** (power - (part == 0.5).int()).double(), 1.0)
    return (x.double() / scales).float().T.to(torch.float8_e4m3fn), scales.float()
