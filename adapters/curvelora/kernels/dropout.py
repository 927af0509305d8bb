"""Dropout whose mask is drawn again wherever it is needed, from a seed, and so never stored.

    drop(x) = x * m / (1 - p)    m_i ~ Bernoulli(1 - p), a function of the seed and the entry's number i (Philox)

A layer with `separate_linear` needs the mask in its forward pass, again for G = g^T drop(x), and for dL/dx; stored masks and
dropped inputs of a block would be the larger part of a checkpointed step's memory. The seed is a tensor, drawn by PyTorch's
generator of the device: it follows `torch.manual_seed`, and gradient checkpointing draws the same one again. The numbers are
others than `F.dropout` would draw.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from curvelora.kernels.launch import launch
from curvelora.kernels.portable import cdiv, to_bf16

SIZE = 1024  # a program has four times as many entries, since Philox makes four numbers at a time


def new_seed(device: torch.device) -> Tensor:
    """(1,), int64, on `device`."""
    return torch.randint(1 << 31, (1,), device=device)


@triton.jit
def _write(out, x, at, uniform, entries, p, ADD: tl.constexpr):
    inside = at < entries
    value = tl.where(uniform >= p, tl.load(x + at, inside, other=0.0).to(tl.float32) / (1 - p), 0.0)
    if ADD:
        value += tl.load(out + at, inside, other=0.0).to(tl.float32)
    tl.store(out + at, to_bf16(value), inside)


@triton.jit
def _dropped(out, x, seed, entries, p, ADD: tl.constexpr, SIZE: tl.constexpr):
    number = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    first, second, third, fourth = tl.rand4x(tl.load(seed), number)
    at = tl.program_id(0).to(tl.int64) * 4 * SIZE + tl.arange(0, SIZE)
    _write(out, x, at, first, entries, p, ADD)
    _write(out, x, at + SIZE, second, entries, p, ADD)
    _write(out, x, at + 2 * SIZE, third, entries, p, ADD)
    _write(out, x, at + 3 * SIZE, fourth, entries, p, ADD)


def _launch(out: Tensor, x: Tensor, seed: Tensor, p: float, add: bool) -> Tensor:
    launch(_dropped, (cdiv(x.numel(), 4 * SIZE),), out, x, seed, x.numel(), p, add, SIZE, num_warps=4)
    return out


def dropped(x: Tensor, seed: Tensor, p: float) -> Tensor:
    """drop(x): the shape of x (bf16, contiguous)."""
    return _launch(torch.empty_like(x), x, seed, p, False)


def add_dropped_(out: Tensor, x: Tensor, seed: Tensor, p: float) -> Tensor:
    """out + drop(x), in place; both bf16, contiguous and of one shape."""
    return _launch(out, x, seed, p, True)


def mask_reference(shape: torch.Size, seed: Tensor, p: float) -> Tensor:
    """m / (1 - p) as the kernel draws it, rounded to bf16, for comparisons: what is left of ones."""
    return dropped(torch.ones(shape, dtype=torch.bfloat16, device=seed.device), seed, p).float()
