"""The longest column of A and the longest row of B, of all layers of a model in one launch.

Their product bounds every entry of BA (Cauchy-Schwarz). A launch for each factor would take longer than reading it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from curvelora.kernels.launch import launch
from curvelora.kernels.merged_weight import padded_rank
from curvelora.kernels.portable import cdiv

BLOCK = 128  # columns of A, or rows of B, a turn
TURNS = 4  # of a program: by more of them, one after another, memory is far from busy


@triton.jit
def _norms(out, layers, RANK: tl.constexpr, BLOCK: tl.constexpr, TURNS: tl.constexpr):
    layer = layers + tl.program_id(0) * 5
    side = tl.program_id(1)
    rank = tl.load(layer + 4).to(tl.int32)
    width = tl.load(layer + 2 + side).to(tl.int32)
    factor = tl.load(layer + side).to(tl.pointer_type(tl.float32))
    # how far apart the numbers of one column of A, or row of B, are in memory, and the columns or rows themselves
    apart, step = tl.where(side == 0, width, 1), tl.where(side == 0, 1, rank)
    ranks = tl.arange(0, RANK)
    largest = tl.zeros((BLOCK,), tl.float32)
    start = tl.program_id(2) * TURNS * BLOCK
    for first in range(start, tl.minimum(start + TURNS * BLOCK, width), BLOCK):
        at = first + tl.arange(0, BLOCK)
        there = (ranks < rank)[:, None] & (at < width)[None, :]
        value = tl.load(
            factor + ranks.to(tl.int64)[:, None] * apart + at.to(tl.int64)[None, :] * step, there, other=0.0
        )
        square = tl.sum(value * value, 0)
        largest = tl.maximum(largest, tl.where(square == square, square, float("inf")))
    # numbers of one sign have the order of their bits; which program comes first does not matter
    size = tl.sqrt(tl.max(largest)).to(tl.int32, bitcast=True)
    tl.atomic_max(out + tl.program_id(0) * 2 + side, size, sem="relaxed")


def factor_norms(pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
    """(layers, 2), fp32, on the factors' device: of each (A, B) the longest column of A and row of B; infinite where one is NaN.

    Args:
        pairs: factors, (r, d_in) and (d_out, r), fp32, all on one device; not empty.
    """
    pairs = [(A.detach().contiguous(), B.detach().contiguous()) for A, B in pairs]
    device = pairs[0][0].device
    rows = [(A.data_ptr(), B.data_ptr(), A.shape[1], B.shape[0], A.shape[0]) for A, B in pairs]
    with torch.cuda.device_of(pairs[0][0]):
        layers = torch.tensor(rows, dtype=torch.int64, pin_memory=device.type == "cuda").to(device, non_blocking=True)
        out = torch.zeros((len(pairs), 2), dtype=torch.int32, device=device)
        rank, width = padded_rank(max(row[4] for row in rows)), max(max(row[2:4]) for row in rows)
        launch(_norms, (len(pairs), 2, cdiv(width, TURNS * BLOCK)), out, layers, rank, BLOCK, TURNS, num_warps=4)
    return out.view(torch.float32)


def factor_norms_reference(pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
    """The same by PyTorch, in fp64."""
    return torch.stack([torch.stack([A.double().norm(dim=0).max(), B.double().norm(dim=1).max()]) for A, B in pairs])
