"""The product T W0 of a few rows T (k, d_out) with the frozen weight (d_out, d_in): what a weight-dependent adapter needs of it.

W0 is read in blocks of rows, dequantised one block at a time where it is quantised, so nothing of its size is made, and autograd
keeps nothing of it: the gradient dL/dT = G W0^T, with G = dL/d(T W0), reads the blocks again. All in fp32 (fp64 for fp64 T).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any
from weakref import WeakValueDictionary

import torch
from peft.utils.integrations import dequantize_bnb_weight
from torch import Tensor, nn

from curvelora.errors import UserError
from curvelora.layers.base_weight import device_of_weight, is_transposed, linear_shape, offloading_hook, whole_weight
from curvelora.precision import exact_products

BLOCK_ENTRIES = 1 << 22  # of a block in fp32: 16 MiB

# A compiled graph can carry a number to its operators, but no layer; a layer that is gone takes its number with it.
_LAYERS: WeakValueDictionary[int, nn.Module] = WeakValueDictionary()
_numbers = itertools.count()


def number_of(layer: nn.Module) -> int:
    """A number under which `weight_product` finds this adapter layer, and the base that it has then, as long as it lives."""
    number = next(_numbers)
    _LAYERS[number] = layer
    return number


def reads_weight(module: nn.Module) -> bool:
    """Whether this module's passes call `weight_product`, so that its base weight has to be there in them (ZeRO-3)."""
    return _LAYERS.get(getattr(module, "number", None)) is module


def weight_product(T: Tensor, number: int, d_in: int) -> Tensor:
    """T W0: (k, d_in) in the dtype of T, differentiable in T.

    Args:
        T: (k, d_out), fp32 or fp64.
        number: of the layer, from `number_of`.
    """
    return _product(T, number, d_in)


@torch.library.custom_op("curvelora::weight_product", mutates_args=())
def _product(T: Tensor, number: int, d_in: int) -> Tensor:
    found = T.new_zeros(T.shape[0], d_in)
    with exact_products(T.device):
        for rows, block in weight_blocks(_LAYERS[number].get_base_layer()):
            found += T[:, rows] @ block.to(T.dtype)
    return found


@_product.register_fake
def _(T: Tensor, number: int, d_in: int) -> Tensor:
    return T.new_empty(T.shape[0], d_in)


@torch.library.custom_op("curvelora::weight_product_gradient", mutates_args=())
def _gradient(grad: Tensor, number: int, d_out: int) -> Tensor:
    found = grad.new_empty(grad.shape[0], d_out)
    with exact_products(grad.device):
        for rows, block in weight_blocks(_LAYERS[number].get_base_layer()):
            found[:, rows] = grad @ block.to(grad.dtype).T
    return found


@_gradient.register_fake
def _(grad: Tensor, number: int, d_out: int) -> Tensor:
    return grad.new_empty(grad.shape[0], d_out)


def _save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    T, ctx.number, _ = inputs
    ctx.d_out = T.shape[1]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return _gradient(grad, ctx.number, ctx.d_out), None, None


_product.register_autograd(_backward, setup_context=_save)


def weight_blocks(base_layer: nn.Module) -> Iterator[tuple[slice, Tensor]]:
    """(rows, W0[rows]) over all rows, each of at most about `BLOCK_ENTRIES` entries, dequantised where W0 is packed.

    Raises:
        UserError: the weight is packed in a way that cannot be read back.
    """
    with whole_weight(base_layer) as weight:
        if (hook := offloading_hook(base_layer)) is not None:
            weight = hook.weights_map["weight"]  # on the host or on disk: brought to the device block by block
        yield from _blocks(base_layer, weight)


def _blocks(base_layer: nn.Module, weight: Tensor) -> Iterator[tuple[slice, Tensor]]:
    d_in, d_out = linear_shape(base_layer, "")
    device = device_of_weight(base_layer)
    kind = type(weight).__name__
    unit = 1
    if kind == "Params4bit":  # a block of rows must begin where a block of codes begins
        unit = weight.quant_state.blocksize // math.gcd(weight.quant_state.blocksize, d_in)
        absmax = _block_scales(weight.quant_state)
    step = max(unit, BLOCK_ENTRIES // d_in // unit * unit)
    for start in range(0, d_out, step):
        rows = slice(start, min(start + step, d_out))
        if kind == "Params4bit":
            yield rows, _from_4bit(weight, absmax, rows, d_in)
        elif kind == "Int8Params":
            yield rows, _from_int8(base_layer, rows)
        elif weight.is_floating_point():
            yield rows, (weight[:, rows].T if is_transposed(base_layer) else weight[rows]).detach().to(device)
        else:
            raise UserError(f"a weight of type {kind} cannot be read back: take an unquantised, NF4 or int8 base")


def _block_scales(state: Any) -> Tensor:
    """The scale of every block of codes, fp32, with double quantisation undone."""
    if not state.nested:
        return state.absmax.float()
    inner = state.state2
    scales = inner.absmax.float().repeat_interleave(inner.blocksize)[: state.absmax.numel()]
    return inner.code[state.absmax.long()].float() * scales + state.offset


def _from_4bit(weight: Tensor, absmax: Tensor, rows: slice, d_in: int) -> Tensor:
    """These rows in the dtype that the layer dequantises to."""
    state = weight.quant_state
    first, last = rows.start * d_in, rows.stop * d_in
    part = type(state)(
        absmax=absmax[first // state.blocksize : -(-last // state.blocksize)].contiguous(),
        shape=torch.Size((rows.stop - rows.start, d_in)),
        code=state.code,
        blocksize=state.blocksize,
        quant_type=state.quant_type,
        dtype=state.dtype,
    )
    codes = weight.data.reshape(-1).view(torch.uint8)  # two codes a byte, in whichever dtype the bytes are stored
    packed = codes[first // 2 : -(-last // 2)].reshape(-1, 1)
    options = {"blocksize": state.blocksize, "quant_type": state.quant_type, "compress_statistics": False}
    return dequantize_bnb_weight(
        type(weight)(packed, requires_grad=False, quant_state=part, bnb_quantized=True, **options)
    )


def _from_int8(base_layer: nn.Module, rows: slice) -> Tensor:
    """These rows in fp32; bitsandbytes moves codes and scales from the weight to the layer's state at the first call."""
    state, weight = base_layer.state, base_layer.weight
    codes = weight.data if state.CB is None else state.CB
    scales = weight.SCB if state.SCB is None else state.SCB
    return codes[rows].float() * scales[rows, None] / 127
