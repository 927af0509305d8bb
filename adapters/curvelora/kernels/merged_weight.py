"""W = W0 + dW in one pass, dW = s f(BA): 4-bit codes are decoded, f is applied and the sum is rounded once to bf16.

    A: (r, d_in) fp32   B: (d_out, r) fp32   W: (d_out, d_in) bf16
    u = BA, formed to about 2^-16 (`split_product`), and where f is the identity from bf16 factors, as LoRA's own products are

One matrix product with W then does what a layer does with one large and two thin ones. An update far below half a unit in the
last place of W0 has to survive that in the mean: it changes few entries, each by a whole unit. Decoded NF4 weights lie anywhere
between bf16's numbers, and rounding to the nearest is a dither by itself. Weights that are numbers of bf16, as a bf16 base's and
half of FP4's are, would lose such an update in every entry. Their sum is rounded away from zero where the part that bf16 has no
room for exceeds what the entry's threshold leaves of a unit, and thresholds are spread evenly over a unit (`_thresholds`): right
in the mean for updates of any size, a bf16 W0 itself where there is none, and the same in each pass. Roundings are then off by
sqrt(2) times as much.

Traffic: codes and scales read (0.52 bytes an entry, 2 of a bf16 base), W written (2); the factors come from the L2 cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from curvelora.kernels import curves, nf4
from curvelora.kernels.launch import launch
from curvelora.kernels.portable import cdiv, dot, split, split_product, to_bf16
from curvelora.layers.dense_delta import DeltaMap

# rows and columns of a tile, tiles a program, warps, stages (`curvelora bench kernels`, H200)
Tile = tuple[int, int, int, int, int]
TILE = (128, 64, 8, 4, 1)


# 2^32 / p and 2^32 / p^2 as signed numbers, p^3 = p + 1
STEP_DOWN, STEP_RIGHT = tl.constexpr(0xC13FA9A9 - (1 << 32)), tl.constexpr(0x91E10DA6 - (1 << 32))


@triton.jit
def _thresholds(rows, columns):
    """(ROWS, COLUMNS) whole numbers of 16 bits, the same for an entry in each call, spread evenly in any part of a matrix.

    Multiples of two numbers modulo 1: the two-dimensional sequence R2 (M. Roberts, "The unreasonable effectiveness of
    quasirandom sequences", 2018).
    """
    down = tl.mul(rows, STEP_DOWN, sanitize_overflow=False)  # modulo 2^32, as it is meant
    right = tl.mul(columns, STEP_RIGHT, sanitize_overflow=False)
    return (tl.add(down[:, None], right[None, :], sanitize_overflow=False) >> 16) & 0xFFFF


@triton.jit
def _rounded_above(x, thresholds):
    """x (fp32) in bf16: away from zero where what bf16 has no room for is 2^16 - `thresholds` or more, else towards it."""
    bits = tl.add(x.to(tl.uint32, bitcast=True), thresholds.to(tl.uint32), sanitize_overflow=False)
    rounded = (bits & 0xFFFF0000).to(tl.float32, bitcast=True)
    return to_bf16(tl.where(x == x, rounded, x))  # or a NaN, whose bits are all ones on a GPU, would become a zero


@triton.jit
def _merged_weight(
    out, A, B, codes, scales, table, scales2, table2, offset, d_out, d_in, rank, outer, inner, amplitude, frequency,
    NAME: tl.constexpr, BASE: tl.constexpr, DITHERED: tl.constexpr, RANK: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    inside = (rows < d_out)[:, None]
    ranks = tl.arange(0, RANK)
    of_rank = ranks < rank
    b = inner * tl.load(B + rows[:, None] * rank + ranks[None, :], inside & of_rank[None, :], other=0.0)
    if NAME == "identity":  # LoRA: factors in bf16, as its own products have them
        b_high = to_bf16(b)
    else:
        b_high, b_low = split(b)
    if BASE >= 3:  # as many tensors: 3 without and 6 with double quantisation, 1 in bf16
        values = nf4.load_table(table)
    nothing = tl.zeros((ROWS, COLUMNS), tl.float32)
    for tile in range(TILES):
        first = (tl.program_id(0) * TILES + tile) * COLUMNS
        columns = first + tl.arange(0, COLUMNS)
        at, there = rows[:, None] * d_in + columns[None, :], inside & (columns < d_in)[None, :]
        if BASE >= 3:
            byte, scale = nf4.load_codes(
                codes, scales, scales2, table2, offset, rows, first, d_in, inside, BASE == 6, COLUMNS
            )
        elif BASE == 1:
            stored = tl.load(codes + at, there, other=0.0)
        a = tl.load(
            A + ranks[:, None] * d_in + columns[None, :], of_rank[:, None] & (columns < d_in)[None, :], other=0.0
        )
        if NAME == "identity":
            u = dot(b_high, to_bf16(a), nothing)
        else:
            a_high, a_low = split(a)
            u = split_product(b_high, b_low, a_high, a_low, nothing)
        weight = outer * curves.value(u, NAME, amplitude, frequency)
        if BASE >= 3:
            weight += nf4.decode(byte, scale, values, ROWS, COLUMNS)
        elif BASE == 1:
            weight += stored.to(tl.float32)
        tl.store(out + at, _rounded_above(weight, _thresholds(rows, columns)) if DITHERED else to_bf16(weight), there)


def padded_rank(rank: int) -> int:
    """The rank that kernels work with: a power of two, at least the 16 terms that a tensor core sums at once."""
    return max(16, 1 << (rank - 1).bit_length())


def scales_of(delta_map: DeltaMap) -> tuple[float, float]:
    """(outer, inner) of outer f(inner u)."""
    return (1.0, delta_map.scale) if delta_map.scale_inside else (delta_map.scale, 1.0)


def merged_weight(
    A: Tensor,
    B: Tensor,
    delta_map: DeltaMap,
    base: list[Tensor],
    out: Tensor,
    tile: Tile | None = None,
    dithered: bool = False,
) -> Tensor:
    """Write W0 + dW, or dW where `base` is empty, to `out` (d_out, d_in), bf16 and contiguous; returns it.

    Args:
        A, B: factors, (r, d_in) and (d_out, r), fp32.
        base: [W0] in bf16, a 4-bit weight from `nf4.codes_of`, or [].
        tile: rows, columns (a multiple of 64), tiles a program, warps, stages; None: `TILE`.
        dithered: round the sum by thresholds, as W0 that is on numbers of bf16 needs it, and not to the nearest.
    """
    f = delta_map.activation
    (rank, d_in), d_out = A.shape, B.shape[0]
    rows, columns, tiles, warps, stages = tile or TILE
    A, B, *base = (tensor.contiguous() for tensor in (A, B, *base))
    # pointers that a base has not are not read; something has to stand in their place
    pointers = [*base, *(A for _ in range(6 - len(base)))]
    grid = (cdiv(d_in, columns * tiles), cdiv(d_out, rows))
    launch(
        _merged_weight, grid, out, A, B, *pointers, d_out, d_in, rank, *scales_of(delta_map), f.amplitude, f.frequency,
        f.name, len(base), dithered, padded_rank(rank), rows, columns, tiles, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return out


def merged_weight_reference(A: Tensor, B: Tensor, delta_map: DeltaMap, W0: Tensor) -> Tensor:
    """The same in fp64, not rounded. W0: (d_out, d_in), or 0."""
    return W0.to(torch.float64) + delta_map.value(B.double() @ A.double())
