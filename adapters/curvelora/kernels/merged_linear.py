"""y = x (W0 + s f(BA))^T + bias, as one product with a merged weight, and its gradients.

    x: (..., d_in) bf16   A: (r, d_in) fp32   B: (d_out, r) fp32   W = W0 + s f(BA): (d_out, d_in) bf16, in the workspace

    dL/dx = g W           G = g^T x, in the workspace      dL/dA, dL/dB from G: `factor_gradients`

Autograd keeps x, saved before the product is made (`held`), and the factors. Traced by torch.compile the layer is one operator.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from curvelora.kernels.factor_gradients import gradients_of_factors
from curvelora.kernels.fp8_gate import Asked
from curvelora.kernels.held import (
    Factors,
    add_product,
    held_factor,
    held_input,
    is_recorded,
    is_watched,
    needs_operator,
    refuse_second_derivative,
    saved,
    saves_itself,
)
from curvelora.kernels.merged_weight import merged_weight
from curvelora.kernels.workspace import LOCK, workspace
from curvelora.layers.dense_delta import DeltaMap, delta_map_of, map_fields


def _product(
    x: Tensor,
    A: Tensor,
    B: Tensor,
    bias: Tensor | None,
    base: list[Tensor],
    dithered: bool,
    name: str,
    amplitude: float,
    frequency: float,
    scale: float,
    inside: bool,
) -> Tensor:
    with LOCK, torch.cuda.device_of(x):
        return F.linear(x, _weight(A, B, base, dithered, name, amplitude, frequency, scale, inside), bias)


def _weight(A: Tensor, B: Tensor, base: list[Tensor], dithered: bool, *fields: Any) -> Tensor:
    """W, in the workspace."""
    out = workspace(B.shape[0], A.shape[1], A.device)
    return merged_weight(A, B, delta_map_of(*fields), base, out, dithered=dithered)


_product_operator = torch.library.custom_op("curvelora::merged_linear", _product, mutates_args=())


@_product_operator.register_fake
def _(x: Tensor, A: Tensor, B: Tensor, *rest: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], B.shape[0]))


def _gradients(
    grad: Tensor,
    x: Tensor,
    A: Tensor,
    B: Tensor,
    base: list[Tensor],
    needs_x: bool,
    needs_factors: bool,
    dithered: bool,
    name: str,
    amplitude: float,
    frequency: float,
    scale: float,
    inside: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dL/dx, dL/dA, dL/dB); what is not needed is empty."""
    fields = (name, amplitude, frequency, scale, inside)
    g, x2 = grad.reshape(-1, B.shape[0]), x.reshape(-1, A.shape[1])
    factors = A.new_empty(0), B.new_empty(0)
    with LOCK, torch.cuda.device_of(x):
        if needs_factors:
            factors = gradients_of_factors(g, x2, A, B, delta_map_of(*fields))
        grad_x = (g @ _weight(A, B, base, dithered, *fields)).view(x.shape) if needs_x else grad.new_empty(0)
    return grad_x, *factors


_gradients_operator = torch.library.custom_op("curvelora::merged_linear_gradients", _gradients, mutates_args=())


@_gradients_operator.register_fake
def _(grad: Tensor, x: Tensor, A: Tensor, B: Tensor, base: Any, needs_x: bool, needs_factors: bool, *rest: Any) -> Any:
    return (
        x.new_empty(x.shape if needs_x else 0),
        A.new_empty(A.shape if needs_factors else 0),
        B.new_empty(B.shape if needs_factors else 0),
    )


def _save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, A, B, _, ctx.base, *ctx.fields = inputs
    ctx.save_for_backward(x, A, B)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    needs_x, *needs = ctx.needs_input_grad[:3]
    grad_x, grad_A, grad_B = _gradients_operator(grad, *ctx.saved_tensors, ctx.base, needs_x, any(needs), *ctx.fields)
    factors = (grad_A, grad_B) if any(needs) else (None, None)
    return grad_x if needs_x else None, *factors, None, [None] * len(ctx.base), *(None for _ in ctx.fields)


_product_operator.register_autograd(_backward, setup_context=_save)


class _Merged(torch.autograd.Function):
    """The product; x is from `held_input` and A from `held_factor`, who have saved what the backward pass needs."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        A: Tensor,
        B: Tensor,
        bias: Tensor | None,
        base: list[Tensor],
        dithered: bool,
        fields: tuple,
        fp8: Asked | None,
    ) -> Tensor:
        ctx.input, ctx.factors, ctx.base, ctx.dithered = x.grad_fn, Factors(A, B), base, dithered
        ctx.fields, ctx.fp8 = fields, fp8
        if saves_itself():
            ctx.save_for_backward(x.detach())  # not as the view of a function's input that it is
        product = _product_operator if is_watched() else _product
        return product(x, A, B, bias, base, dithered, *fields)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        needs_x, *needs = ctx.needs_input_grad[:3]
        (x,), (A, B) = saved(ctx.input, ctx.saved_tensors), ctx.factors.tensors()
        grad_x = grad_A = grad_B = None
        g = grad.reshape(-1, B.shape[0])
        with LOCK, torch.cuda.device_of(x):
            if any(needs):  # first: what this allocates on its way is gone before dL/dx, the largest of all, is there
                x2 = x.reshape(-1, A.shape[1])
                grad_A, grad_B = gradients_of_factors(g, x2, A, B, delta_map_of(*ctx.fields), ctx.fp8)
            if needs_x:
                grad_x = add_product(ctx.input, g, _weight(A, B, ctx.base, ctx.dithered, *ctx.fields), x.shape)
        return grad_x, grad_A, grad_B, None, None, None, None, None


def merged_linear(
    x: Tensor,
    A: Tensor,
    B: Tensor,
    bias: Tensor | None,
    base: list[Tensor],
    delta_map: DeltaMap,
    fp8: Asked | None = None,
    dithered: bool = False,
) -> Tensor:
    """x (W0 + s f(BA))^T + bias: (..., d_out), bf16, differentiable in x, A and B.

    Args:
        x: (..., d_in), bf16, or another dtype, which is rounded to it, in training once for all that `held_input` joins.
        A, B: factors, (r, d_in) and (d_out, r), fp32.
        bias: (d_out,), bf16, or None; frozen.
        base: [W0] in bf16, or a 4-bit weight from `nf4.codes_of`; frozen.
        delta_map: with an `Activation` whose kernel exists (`curves.NAMES`).
        fp8: from `fp8_gate.asked`, or None.
        dithered: as `merged_weight` has it, for a base whose weights are numbers of bf16.
    """
    fields = map_fields(delta_map)
    if not is_recorded(x, A, B):
        product = _product_operator if needs_operator(x) else _product
        return product(x.to(torch.bfloat16), A, B, bias, base, dithered, *fields)
    return _Merged.apply(held_input(x), held_factor(A, B), B, bias, base, dithered, fields, fp8)
