"""bitsandbytes' 4-bit weights inside kernels.

Two codes a byte, the first in the high half; a block of 64 consecutive weights has one scale. With double quantisation
(arXiv 2305.14314, section 3) the scale is itself a code: scale = table2[byte] * scale2[block / 256] + offset.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from curvelora.kernels.launch import launch
from curvelora.kernels.portable import cdiv, to_bf16

BLOCK = 64  # weights a scale
BLOCK2 = tl.constexpr(256)  # scales a scale of the second level
TILE = (16, 256, 4)  # rows, columns and warps of `decoded`


def codes_of(base_layer: nn.Module) -> list[Tensor]:
    """What `decode` reads: [codes (bytes), scales, table (16,)], and with double quantisation [..., scales2, table2, offset].

    Nothing is copied. `base_layer` has a weight for which `why_unreadable` finds nothing.
    """
    weight = base_layer.weight
    state = weight.quant_state
    with torch._C.DisableTorchFunctionSubclass():  # the weight's class makes every view ten times as dear
        codes = weight.data.view(-1).view(torch.uint8)
    found = [codes, state.absmax, state.code]
    return [*found, state.state2.absmax, state.state2.code, state.offset] if state.nested else found


def why_unreadable(base_layer: nn.Module) -> str | None:
    """Why `decode` cannot read this layer's weight; None where it can."""
    weight = base_layer.weight
    if type(weight).__name__ != "Params4bit":
        return "the base is neither in 4 bits nor a linear layer in bf16"
    state: Any = weight.quant_state
    if state is None:
        return "the base is not quantised yet"
    if state.blocksize != BLOCK or state.shape[1] % BLOCK:
        return f"rows of {state.shape[1]} weights in blocks of {state.blocksize}: whole blocks of {BLOCK} are read"
    if state.nested and state.state2.blocksize != BLOCK2.value:
        return f"scales in blocks of {state.state2.blocksize}"
    if getattr(state, "packing_format_for_cpu", False):
        return "codes in the order of a CPU kernel"
    return None


def lies_between_numbers(base_layer: nn.Module) -> bool:
    """Whether W0 lies anywhere between the numbers of bf16, as NF4's table times a scale does.

    Then updates far below bf16's half unit survive, in the mean, in W0 + dW rounded to the nearest. FP4's table is half powers of
    two.
    """
    return base_layer.weight.quant_state.quant_type == "nf4"


@triton.jit
def load_codes(
    codes, scales, scales2, table2, offset, rows, first, d_in, inside, NESTED: tl.constexpr, COLUMNS: tl.constexpr
):
    """(bytes (ROWS, COLUMNS / 2), scales (ROWS, COLUMNS / 64)) of W0[rows, first : first + COLUMNS], for `decode`.

    `inside` (ROWS, 1) masks rows, columns beyond d_in are 0. d_in and `first` are multiples of 64, so a tile begins and ends
    with a block.
    """
    halves = first // 2 + tl.arange(0, COLUMNS // 2)
    byte = tl.load(
        codes + rows[:, None] * (d_in // 2) + halves[None, :], inside & (halves < d_in // 2)[None, :], other=0
    )
    blocks = first // 64 + tl.arange(0, COLUMNS // 64)
    there = inside & (blocks < d_in // 64)[None, :]
    index = rows[:, None] * (d_in // 64) + blocks[None, :]
    scale = tl.load(scales + index, there, other=0)
    if NESTED:
        scale2 = tl.load(scales2 + index // BLOCK2, there, other=0.0)
        scale = tl.load(table2 + scale.to(tl.int32)) * scale2 + tl.load(offset)
    return byte, scale


@triton.jit
def load_table(table):
    """The sixteen values, for `decode`."""
    return tl.load(table + tl.arange(0, 16))


@triton.jit
def decode(byte, scale, values, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """W0 of a tile, fp32, from `load_codes` and `load_table`. The table is read from shared memory, one code a bank."""
    code = tl.join((byte >> 4).to(tl.int32), (byte & 0xF).to(tl.int32))
    value = tl.gather(values, tl.reshape(code, (ROWS * COLUMNS,)), 0)
    return tl.reshape(tl.reshape(value, (ROWS, COLUMNS // 64, 64)) * scale[:, :, None], (ROWS, COLUMNS))


@triton.jit
def _decoded(
    out, codes, scales, table, scales2, table2, offset, d_out, d_in,
    NESTED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    first = tl.program_id(0) * COLUMNS
    columns = first + tl.arange(0, COLUMNS)
    inside = (rows < d_out)[:, None]
    byte, scale = load_codes(codes, scales, scales2, table2, offset, rows, first, d_in, inside, NESTED, COLUMNS)
    weight = decode(byte, scale, load_table(table), ROWS, COLUMNS)
    tl.store(out + rows[:, None] * d_in + columns[None, :], to_bf16(weight), inside & (columns < d_in)[None, :])


def decoded(base: list[Tensor], out: Tensor) -> Tensor:
    """Write W0 to `out` (d_out, d_in), bf16 and contiguous; returns it. `base` is from `codes_of`."""
    d_out, d_in = out.shape
    pointers = [*base, *(base[0] for _ in range(6 - len(base)))]  # those that a base has not are not read
    rows, columns, warps = TILE
    grid = (cdiv(d_in, columns), cdiv(d_out, rows))
    launch(_decoded, grid, out, *pointers, d_out, d_in, len(base) == 6, rows, columns, num_warps=warps)
    return out
