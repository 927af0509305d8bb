"""Dropout whose mask is drawn again wherever it is needed, from a seed, and so never stored.

    drop(x) = x * m / (1 - p)    m_i ~ Bernoulli(1 - p), a function of the seed and the entry's number i (Philox)

with p rounded to a multiple of 2^-16, in the mask and in 1 / (1 - p) alike: an entry takes half of a word, since drawing a whole
one takes a GPU longer than memory does. (FlashAttention's dropout has 2^-8.)

A layer with `separate_linear` needs the mask in its forward pass, again for G = g^T drop(x), and for dL/dx; stored masks and
dropped inputs of a block would be the larger part of a checkpointed step's memory. The seed is a tensor, drawn by PyTorch's
generator of the device: it follows `torch.manual_seed`, and gradient checkpointing draws the same one again. The numbers are
others than `F.dropout` would draw.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import gcd

import torch
import triton
import triton.language as tl
from torch import Tensor

from curvelora.kernels.launch import launch
from curvelora.kernels.portable import cdiv, to_bf16

SIZE = 512  # a program has eight times as many entries: Philox makes four words at a time, and each is for two
STEPS = 1 << 16  # of p
BAND = 1 << 24  # entries of a product that is there only to be dropped and added


def new_seed(device: torch.device) -> Tensor:
    """(1,), int64, on `device`."""
    return torch.randint(1 << 31, (1,), device=device)


@triton.jit
def _write(out, x, at, drawn, entries, limit, scale, ADD: tl.constexpr):
    inside = at < entries
    value = tl.where(drawn >= limit, scale * tl.load(x + at, inside, other=0.0).to(tl.float32), 0.0)
    if ADD:
        value += tl.load(out + at, inside, other=0.0).to(tl.float32)
    tl.store(out + at, to_bf16(value), inside)


@triton.jit
def _write_two(out, x, at, word, entries, limit, scale, ADD: tl.constexpr, SIZE: tl.constexpr):
    word = word.to(tl.uint32, bitcast=True)
    _write(out, x, at, (word & 0xFFFF).to(tl.int32), entries, limit, scale, ADD)
    _write(out, x, at + SIZE, (word >> 16).to(tl.int32), entries, limit, scale, ADD)


@triton.jit
def _dropped(out, x, seed, start, entries, limit, scale, ADD: tl.constexpr, SIZE: tl.constexpr):
    number = (start + tl.program_id(0)).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    first, second, third, fourth = tl.randint4x(tl.load(seed), number)
    at = tl.program_id(0).to(tl.int64) * 8 * SIZE + tl.arange(0, SIZE)
    _write_two(out, x, at, first, entries, limit, scale, ADD, SIZE)
    _write_two(out, x, at + 2 * SIZE, second, entries, limit, scale, ADD, SIZE)
    _write_two(out, x, at + 4 * SIZE, third, entries, limit, scale, ADD, SIZE)
    _write_two(out, x, at + 6 * SIZE, fourth, entries, limit, scale, ADD, SIZE)


def _launch(out: Tensor, x: Tensor, seed: Tensor, p: float, add: bool, start: int = 0) -> Tensor:
    limit, programs = round(p * STEPS), cdiv(x.numel(), 8 * SIZE)
    scale = STEPS / (STEPS - limit) if limit < STEPS else 0.0
    launch(_dropped, (programs,), out, x, seed, start, x.numel(), limit, scale, add, SIZE, num_warps=4)
    return out


def dropped(x: Tensor, seed: Tensor, p: float) -> Tensor:
    """drop(x): the shape of x (bf16, contiguous)."""
    return _launch(torch.empty_like(x), x, seed, p, False)


def add_dropped_(out: Tensor, x: Tensor, seed: Tensor, p: float, first: int = 0) -> Tensor:
    """out + drop(x), in place; both bf16, contiguous and of one shape.

    Args:
        first: the row of the whole matrix that these begin with, a start of `bands`.
    """
    return _launch(out, x, seed, p, True, first * x.shape[-1] // (8 * SIZE))


def bands(tokens: int, width: int) -> Iterator[slice]:
    """The rows of a (tokens, width) matrix in bands of some `BAND` entries, each of which begins where a program's entries do."""
    whole = 8 * SIZE // gcd(8 * SIZE, width)
    step = max(1, BAND // (whole * width)) * whole
    return (slice(start, min(start + step, tokens)) for start in range(0, tokens, step))


def mask_reference(shape: torch.Size, seed: Tensor, p: float) -> Tensor:
    """m / (1 - p) as the kernel draws it, rounded to bf16, for comparisons: what is left of ones."""
    return dropped(torch.ones(shape, dtype=torch.bfloat16, device=seed.device), seed, p).float()
