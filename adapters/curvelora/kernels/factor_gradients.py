"""dL/dA and dL/dB of dW = s f(BA) from G = dL/dW, the product g^T x of a backward pass.

    M = G * s f'(u)    dL/dB = M A^T    dL/dA = B^T M          G: (d_out, d_in) bf16   M is never formed

f' = f'(0) + e(u). The tensor cores multiply bf16, and M rounded to bf16 would lose an e of the size of bf16's half unit, 2^-9:
Sinter's at its published setting. So G f'(0) and G e(u) are rounded on their own and summed in fp32:

    dL/dB = s (f'(0) G + round(G e(u))) A^T

and f'(0), a power of two for every f here, scales G without rounding. u is formed to 2^-16 (`split_product`).

Two kernels read G once each. One keeps its rows of dL/dB in registers and walks over columns, the other keeps columns of dL/dA
and walks over rows; where there are too few of those for the GPU's processors, the walk is split and the parts are summed, so
there are no atomics and the sums have one order. Traffic: G twice (4 bytes an entry), of which the second reading hits the L2
cache where G fits.

Where f is the identity the layer is LoRA, and the gradients need no G:  dL/dB = s g^T (x A^T),  dL/dA = s (g B)^T x.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from curvelora.activations import Activation
from curvelora.kernels import curves
from curvelora.kernels.merged_weight import padded_rank, scales_of
from curvelora.kernels.portable import dot, split, split_product, to_bf16
from curvelora.kernels.workspace import workspace
from curvelora.layers.dense_delta import DeltaMap

# rows and columns of a tile, programs to aim at, warps, stages (`curvelora bench kernels`, H100)
Tile = tuple[int, int, int, int, int]
TILE_B = (64, 32, 528, 4, 3)
TILE_AB = (64, 128, 264, 4, 2)
AT_ONCE = False
TILE_A = (64, 128, 264, 4, 2)


@triton.jit
def _slopes(G, u, inner, at_zero, amplitude, frequency, NAME: tl.constexpr):
    """G f'(0) and G (f'(u) - f'(0)), each rounded to bf16."""
    linear = to_bf16(G * at_zero)
    return linear, to_bf16(G * curves.slope_beyond_zero(u * inner, NAME, amplitude, frequency))


@triton.jit
def _gradient_of_B(
    out, G, A, B, d_out, d_in, rank, span, factor, inner, at_zero, amplitude, frequency,
    NAME: tl.constexpr, RANK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = (rows < d_out)[:, None]
    ranks = tl.arange(0, RANK)
    of_rank = ranks < rank
    b_high, b_low = split(tl.load(B + rows[:, None] * rank + ranks[None, :], inside & of_rank[None, :], other=0.0))
    sums = tl.zeros((ROWS, RANK), tl.float32)
    start = tl.program_id(1) * span
    for first in range(start, tl.minimum(start + span, d_in), COLUMNS):
        columns = first + tl.arange(0, COLUMNS)
        there = (columns < d_in)[None, :]
        a = tl.load(A + ranks[:, None] * d_in + columns[None, :], of_rank[:, None] & there, other=0.0)
        a_high, a_low = split(a)
        g = tl.load(G + rows[:, None] * d_in + columns[None, :], inside & there, other=0.0).to(tl.float32)
        u = split_product(b_high, b_low, a_high, a_low, tl.zeros((ROWS, COLUMNS), tl.float32))
        linear, beyond = _slopes(g, u, inner, at_zero, amplitude, frequency, NAME)
        transposed = tl.trans(a_high)
        sums = dot(beyond, transposed, sums)
        if NAME != "relu":
            sums = dot(linear, transposed, sums)
    at = tl.program_id(1) * d_out * rank + rows[:, None] * rank + ranks[None, :]
    tl.store(out + at, factor * sums, inside & of_rank[None, :])


@triton.jit
def _gradient_of_A(
    out, G, A, B, d_out, d_in, rank, span, factor, inner, at_zero, amplitude, frequency,
    NAME: tl.constexpr, RANK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    there = (columns < d_in)[None, :]
    ranks = tl.arange(0, RANK)
    of_rank = ranks < rank
    a_high, a_low = split(tl.load(A + ranks[:, None] * d_in + columns[None, :], of_rank[:, None] & there, other=0.0))
    sums = tl.zeros((RANK, COLUMNS), tl.float32)
    start = tl.program_id(1) * span
    for first in range(start, tl.minimum(start + span, d_out), ROWS):
        rows = first + tl.arange(0, ROWS)
        inside = (rows < d_out)[:, None]
        b_high, b_low = split(tl.load(B + rows[:, None] * rank + ranks[None, :], inside & of_rank[None, :], other=0.0))
        g = tl.load(G + rows[:, None] * d_in + columns[None, :], inside & there, other=0.0).to(tl.float32)
        u = split_product(b_high, b_low, a_high, a_low, tl.zeros((ROWS, COLUMNS), tl.float32))
        linear, beyond = _slopes(g, u, inner, at_zero, amplitude, frequency, NAME)
        transposed = tl.trans(b_high)
        sums = dot(transposed, beyond, sums)
        if NAME != "relu":
            sums = dot(transposed, linear, sums)
    at = tl.program_id(1) * rank * d_in + ranks[:, None] * d_in + columns[None, :]
    tl.store(out + at, factor * sums, of_rank[:, None] & there)


@triton.jit
def _gradients_at_once(
    out_A, out_B, G, A, B, d_out, d_in, rank, span, factor, inner, at_zero, amplitude, frequency,
    NAME: tl.constexpr, RANK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
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
        g = tl.load(G + rows[:, None] * d_in + columns[None, :], inside & there, other=0.0).to(tl.float32)
        u = split_product(b_high, b_low, a_high, a_low, tl.zeros((ROWS, COLUMNS), tl.float32))
        linear, beyond = _slopes(g, u, inner, at_zero, amplitude, frequency, NAME)
        b_transposed = tl.trans(b_high)
        sums = dot(b_transposed, beyond, sums)
        part = dot(beyond, a_transposed, tl.zeros((ROWS, RANK), tl.float32))
        if NAME != "relu":
            sums = dot(b_transposed, linear, sums)
            part = dot(linear, a_transposed, part)
        tl.store(out_B + tl.program_id(0) * d_out * rank + of_B, factor * part, inside & of_rank[None, :])
    at = tl.program_id(1) * rank * d_in + ranks[:, None] * d_in + columns[None, :]
    tl.store(out_A + at, factor * sums, of_rank[:, None] & there)


def gradients_at_once(G: Tensor, A: Tensor, B: Tensor, delta_map: DeltaMap, tile: Tile) -> tuple[Tensor, Tensor]:
    """As `factor_gradients`, reading G once: parts of dL/dB, one for each block of columns, go through memory instead."""
    d_out, d_in = G.shape
    rank = A.shape[0]
    rows, columns, programs, warps, stages = tile
    blocks = triton.cdiv(d_in, columns)
    span = triton.cdiv(triton.cdiv(d_out, max(1, programs // blocks)), rows) * rows
    parts = triton.cdiv(d_out, span)
    out_A = torch.empty((parts, rank, d_in), dtype=torch.float32, device=G.device)
    out_B = torch.empty((blocks, d_out, rank), dtype=torch.float32, device=G.device)
    f = delta_map.activation
    assert isinstance(f, Activation)
    _gradients_at_once[(blocks, parts)](
        out_A, out_B, G, A, B, d_out, d_in, rank, span, delta_map.scale, scales_of(delta_map)[1], f.slope_at_zero,
        f.amplitude, f.frequency, f.name, padded_rank(rank), rows, columns, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return out_A.sum(0), out_B.sum(0)


def gradient_of(factor: str, G: Tensor, A: Tensor, B: Tensor, delta_map: DeltaMap, tile: Tile) -> Tensor:
    """dL/dA (r, d_in) or dL/dB (d_out, r), fp32, for `factor` "A" or "B"; arguments as of `factor_gradients`."""
    d_out, d_in = G.shape
    rank = A.shape[0]
    rows, columns, programs, warps, stages = tile
    if factor == "A":
        kernel, blocks, walked, step, shape = _gradient_of_A, triton.cdiv(d_in, columns), d_out, rows, (rank, d_in)
    else:
        kernel, blocks, walked, step, shape = _gradient_of_B, triton.cdiv(d_out, rows), d_in, columns, (d_out, rank)
    span = triton.cdiv(triton.cdiv(walked, max(1, programs // blocks)), step) * step
    parts = triton.cdiv(walked, span)
    out = torch.empty((parts, *shape), dtype=torch.float32, device=G.device)
    A, B = A.contiguous(), B.contiguous()
    f = delta_map.activation
    assert isinstance(f, Activation)
    kernel[(blocks, parts)](
        out, G, A, B, d_out, d_in, rank, span, delta_map.scale, scales_of(delta_map)[1], f.slope_at_zero,
        f.amplitude, f.frequency, f.name, padded_rank(rank), rows, columns, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return out[0] if parts == 1 else out.sum(0)


def factor_gradients(G: Tensor, A: Tensor, B: Tensor, delta_map: DeltaMap) -> tuple[Tensor, Tensor]:
    """(dL/dA, dL/dB), fp32.

    Args:
        G: (d_out, d_in), bf16, contiguous.
        A, B: factors, (r, d_in) and (d_out, r), fp32.
        delta_map: with an `Activation` of `curves.NAMES`, not the identity.
    """
    if AT_ONCE:
        return gradients_at_once(G, A, B, delta_map, TILE_AB)
    return gradient_of("A", G, A, B, delta_map, TILE_A), gradient_of("B", G, A, B, delta_map, TILE_B)


def low_rank_gradients(g: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """LoRA's, in bf16 products as autograd would make them. g: (tokens, d_out), x: (tokens, d_in)."""
    back = g @ B.to(g.dtype)
    down = x @ A.to(x.dtype).T
    return scale * (back.T @ x).float(), scale * (g.T @ down).float()


def gradients_of_factors(g: Tensor, x: Tensor, A: Tensor, B: Tensor, delta_map: DeltaMap) -> tuple[Tensor, Tensor]:
    """(dL/dA, dL/dB), fp32, from a layer's g = dL/dy (tokens, d_out) and x (tokens, d_in), both bf16; G is in the workspace."""
    if delta_map.activation.name == "identity":
        return low_rank_gradients(g, x, A, B, delta_map.scale)
    G = torch.mm(g.T, x, out=workspace(B.shape[0], A.shape[1], x.device))
    return factor_gradients(G, A, B, delta_map)


def factor_gradients_reference(G: Tensor, A: Tensor, B: Tensor, delta_map: DeltaMap) -> tuple[Tensor, Tensor]:
    """The same in fp64 throughout."""
    A, B = A.double(), B.double()
    M = G.double() * delta_map.slope(B @ A)
    return B.T @ M, M @ A.T
