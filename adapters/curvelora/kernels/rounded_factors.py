"""Both factors in bf16, as LoRA's thin products take them, in one launch: to begin one takes a GPU longer than the work."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from curvelora.kernels.launch import launch
from curvelora.kernels.portable import cdiv, to_bf16

BLOCK = 1024  # entries of each factor that a program rounds


@triton.jit
def _round(out, factor, at, size):
    tl.store(out + at, to_bf16(tl.load(factor + at, at < size, other=0.0)), at < size)


@triton.jit
def _rounded(out_A, out_B, zeros, A, B, size_A, size_B, count, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    _round(out_A, A, at, size_A)
    _round(out_B, B, at, size_B)
    tl.store(zeros + at, 0, at < count)


def rounded_factors(A: Tensor, B: Tensor, zeros: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(A, B) in bf16, contiguous, and `zeros` filled with zeros on the way.

    Args:
        A, B: factors, (r, d_in) and (d_out, r).
        zeros: contiguous, or None.
    """
    A, B = A.contiguous(), B.contiguous()
    out_A, out_B = (torch.empty_like(factor, dtype=torch.bfloat16) for factor in (A, B))
    count = 0 if zeros is None else zeros.numel()
    launch(
        _rounded, (cdiv(max(A.numel(), B.numel(), count), BLOCK),), out_A, out_B, out_A if zeros is None else zeros, A, B,
        A.numel(), B.numel(), count, BLOCK, num_warps=4,
    )  # fmt: skip
    return out_A, out_B
