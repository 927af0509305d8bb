"""dL/dA and dL/dB of dW = s f(BA) from G = dL/dW, the product g^T x of a backward pass.

    M = G * s f'(u)    dL/dB = M A^T    dL/dA = B^T M          G: (d_out, d_in) bf16   M is never formed

f' = f'(0) + e(u). The tensor cores multiply bf16, and M rounded to bf16 would lose an e of the size of bf16's half unit, 2^-9:
Sinter's at its published setting. So G, which is bf16 already, and G e(u) / f'(0) are multiplied on their own and summed in fp32:

    dL/dB = s f'(0) (G + round(G e(u) / f'(0))) A^T        or s round(G e(u)) A^T where f'(0) = 0

u is formed to 2^-16 (`split_product`).

A program keeps the columns of dL/dA that belong to its columns of G in registers and walks over rows; what its tiles add to
dL/dB goes to memory and is summed by a second kernel, so there are no atomics and the sums have one order. Traffic: G once
(2 bytes an entry), and 4 r bytes a row and tile written and read again for the parts of dL/dB, at r = 64 as much as G. Two
kernels that read G once each, with nothing to sum, took 8 to 17 % longer: both form u and f' (docs/decisions.md, 8).

Where f is the identity the layer is LoRA, and the gradients need no G:  dL/dB = s g^T (x A^T),  dL/dA = s (g B)^T x.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from curvelora.kernels import curves
from curvelora.kernels.fp8_gate import Asked
from curvelora.kernels.fp8_product import fp8_product
from curvelora.kernels.fp8_readings import first_readings, second_readings
from curvelora.kernels.launch import launch
from curvelora.kernels.merged_weight import Tile, padded_rank, scales_of
from curvelora.kernels.portable import add_parts, cdiv, dot, split, split_product, to_bf16
from curvelora.kernels.rounded_factors import rounded_factors
from curvelora.kernels.workspace import workspace
from curvelora.layers.dense_delta import DeltaMap

# rows and columns of a tile, programs to aim at, warps, stages (`curvelora bench kernels`, H200)
TILE = (64, 128, 264, 4, 2)
# at twice the rank that would take more than the 99 KiB of shared memory that every GPU has
WIDE_TILE = (32, 64, 264, 4, 1)
SUM_TILE = (8, 512)  # parts a turn, and entries of a program, of the sums
# entries of the parts of dL/dB that are there at once: 96 MiB, so that a large layer is done in bands of rows
PARTS = 3 << 23


def tile_for(rank: int) -> Tile:
    """The tile for factors of this rank."""
    return TILE if rank <= 64 else WIDE_TILE


@triton.jit
def _gradients(
    out_A, out_B, G, A, B, d_out, d_in, rank, span, factor, inner, inverse, amplitude, frequency,
    NAME: tl.constexpr, LINEAR: tl.constexpr, SCALED: tl.constexpr,
    RANK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    there = (columns < d_in)[None, :]
    ranks = tl.arange(0, RANK)
    of_rank = ranks < rank
    a_high, a_low = split(tl.load(A + ranks[:, None] * d_in + columns[None, :], of_rank[:, None] & there, other=0.0))
    a_transposed = tl.trans(a_high)
    sums = tl.zeros((RANK, COLUMNS), tl.float32)
    start = tl.program_id(1) * span
    for first in range(start, tl.minimum(start + span, d_out), ROWS):
        rows = first + tl.arange(0, ROWS)
        inside = (rows < d_out)[:, None]
        of_B = rows[:, None] * rank + ranks[None, :]
        b_high, b_low = split(tl.load(B + of_B, inside & of_rank[None, :], other=0.0))
        g = tl.load(G + rows[:, None] * d_in + columns[None, :], inside & there, other=0.0)
        u = split_product(b_high, b_low, a_high, a_low, tl.zeros((ROWS, COLUMNS), tl.float32))
        if SCALED:  # not for factors of 1
            slope = inverse * curves.slope_beyond_zero(u * inner, NAME, amplitude, frequency)
        else:
            slope = curves.slope_beyond_zero(u, NAME, amplitude, frequency)
        beyond = to_bf16(g.to(tl.float32) * slope)
        b_transposed = tl.trans(b_high)
        part = dot(beyond, a_transposed, tl.zeros((ROWS, RANK), tl.float32))
        sums = dot(b_transposed, beyond, sums)
        if LINEAR:
            sums = dot(b_transposed, g, sums)
            part = dot(g, a_transposed, part)
        tl.store(out_B + tl.program_id(0) * d_out * rank + of_B, factor * part, inside & of_rank[None, :])
    at = tl.program_id(1) * rank * d_in + ranks[:, None] * d_in + columns[None, :]
    tl.store(out_A + at, factor * sums, of_rank[:, None] & there)


@triton.jit
def _sum(
    out, parts, more, size, count, count_more, apart_more, first,
    ADD: tl.constexpr, TURN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = first + tl.arange(0, BLOCK)
    there = at < size
    total = tl.load(out + at, there, other=0.0) if ADD else tl.zeros((BLOCK,), tl.float32)
    total = add_parts(total, parts, at, there, count, size, TURN)
    total = add_parts(total, more, at, there, count_more, apart_more, TURN)
    tl.store(out + at, total, there)


@triton.jit
def _sums(
    out_A, out_B, parts_A, parts_B, more_A, more_B, size_A, size_B, count_A, count_B, count_more_A, count_more_B, apart_more_B,
    ADD: tl.constexpr, TURN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Parts of both gradients in one launch. With ADD that of A is added to what is there: of bands of rows before this one."""
    programs_A = tl.cdiv(size_A, BLOCK)
    program = tl.program_id(0)
    if program < programs_A:
        _sum(out_A, parts_A, more_A, size_A, count_A, count_more_A, size_A, program * BLOCK, ADD, TURN, BLOCK)
    else:
        first = (program - programs_A) * BLOCK
        _sum(out_B, parts_B, more_B, size_B, count_B, count_more_B, apart_more_B, first, False, TURN, BLOCK)


def factor_gradients(
    G: Tensor,
    A: Tensor,
    B: Tensor,
    delta_map: DeltaMap,
    tile: Tile | None = None,
    linear: bool = True,
    more: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """(dL/dA, dL/dB), fp32.

    Args:
        G: (d_out, d_in), bf16, contiguous.
        A, B: factors, (r, d_in) and (d_out, r), fp32.
        delta_map: with an `Activation` of `curves.NAMES`, not the identity.
        tile: rows and columns of a tile, programs to aim at, warps, stages; None: `tile_for`.
        linear: with the part of f'(0); else only what f' - f'(0) adds.
        more: parts of both that are added, (n, r, d_in) and (m, d_out, r), fp32, contiguous.
    """
    (d_out, d_in), rank = G.shape, A.shape[0]
    rows, columns, programs, warps, stages = tile or tile_for(rank)
    A, B, f = A.contiguous(), B.contiguous(), delta_map.activation
    at_zero, inner = f.slope_at_zero or 1.0, scales_of(delta_map)[1]
    blocks = cdiv(d_in, columns)
    band = max(rows, PARTS // (blocks * rank) // rows * rows)
    of_A, of_B = torch.empty_like(A), torch.empty_like(B)
    more_A, more_B = more or (None, None)
    for start in range(0, d_out, band):
        here = slice(start, min(start + band, d_out))
        height = here.stop - start
        span = cdiv(cdiv(height, max(1, programs // blocks)), rows) * rows
        parts_A = torch.empty((cdiv(height, span), rank, d_in), dtype=torch.float32, device=G.device)
        parts_B = torch.empty((blocks, height, rank), dtype=torch.float32, device=G.device)
        launch(
            _gradients, (blocks, len(parts_A)), parts_A, parts_B, G[here], A, B[here], height, d_in, rank, span,
            delta_map.scale * at_zero, inner, 1 / at_zero, f.amplitude, f.frequency,
            f.name, linear and f.slope_at_zero != 0, inner != 1 or at_zero != 1, padded_rank(rank), rows, columns,
            num_warps=warps, num_stages=stages,
        )  # fmt: skip
        turn, block = SUM_TILE
        of_band = of_B[here]
        launch(
            _sums, (cdiv(of_A.numel(), block) + cdiv(of_band.numel(), block),), of_A, of_band, parts_A, parts_B,
            of_A if more_A is None else more_A, of_B if more_B is None else more_B[:, here],
            of_A.numel(), of_band.numel(), len(parts_A), blocks,
            0 if start or more_A is None else len(more_A), 0 if more_B is None else len(more_B), of_B.numel(),
            start > 0, turn, block,
        )  # fmt: skip
    return of_A, of_B


def low_rank_gradients(
    g: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: float, back_and_A: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """(dL/dA, dL/dB) of dW = scale BA, fp32: products of bf16 as autograd would make them, but summed in fp32.

    Args:
        g: (tokens, d_out), bf16.
        x: (tokens, d_in), bf16.
        A, B: factors, (r, d_in) and (d_out, r), fp32.
        back_and_A: from `thin_back`, where it is known.
    """
    back, A = back_and_A or thin_back(g, A, B, scale)
    down = scaled_product(x, A.T, scale)
    return _fp32_product(back.T, x), _fp32_product(g.T, down)


def thin_back(g: Tensor, A: Tensor, B: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """(scale g B, A): what makes g dW of dW = scale BA, (tokens, r) and (r, d_in), bf16."""
    A, B = rounded_factors(A, B)
    return scaled_product(g, B, scale), A


def scaled_product(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """scale a b of bf16 matrices, rounded once."""
    return a.new_empty(a.shape[0], b.shape[1]).addmm_(a, b, beta=0, alpha=scale)


def _fp32_product(a: Tensor, b: Tensor) -> Tensor:
    """a b in fp32, of bf16 matrices."""
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    with torch.autocast(a.device.type, enabled=False):  # which may surround the backward pass
        return a.float() @ b.float()  # where there is no such operator; products of bf16 numbers are exact in fp32


def gradients_of_factors(
    g: Tensor,
    x: Tensor,
    A: Tensor,
    B: Tensor,
    delta_map: DeltaMap,
    fp8: Asked | None = None,
    back_and_A: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """(dL/dA, dL/dB), fp32; G is in the workspace.

    Args:
        g: dL/dy (tokens, d_out), bf16.
        x: (tokens, d_in), bf16.
        fp8: who is asked whether G of the part beyond f'(0) may be from FP8, and counts; or None.
        back_and_A: from `thin_back`, where f is the identity and it is known.
    """
    if delta_map.activation.name == "identity":
        return low_rank_gradients(g, x, A, B, delta_map.scale, back_and_A)
    G = workspace(B.shape[0], A.shape[1], x.device)
    # without tokens no column has a largest entry
    if fp8 is None or not len(g) or (count := fp8.granted()) is None:
        return factor_gradients(torch.mm(g.T, x, out=G), A, B, delta_map)
    g, x = (t if t.stride(1) == 1 else t.contiguous() for t in (g, x))
    codes_g, codes_x, *linear = second_readings(g, x, *first_readings(g, x, A, B, delta_map.slope_at_zero))
    fp8_product(codes_g, codes_x, G)
    count.products += 1
    return factor_gradients(G, A, B, delta_map, linear=False, more=tuple(linear))


def factor_gradients_reference(G: Tensor, A: Tensor, B: Tensor, delta_map: DeltaMap) -> tuple[Tensor, Tensor]:
    """The same in fp64 throughout."""
    A, B = A.double(), B.double()
    M = G.double() * delta_map.slope(B @ A)
    return B.T @ M, M @ A.T
