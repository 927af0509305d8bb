"""y = x (W0 + s f(BA))^T + bias over an NF4 base, as one product with a merged weight, and its gradients.

    x: (..., d_in) bf16   A: (r, d_in) fp32   B: (d_out, r) fp32   W = W0 + s f(BA): (d_out, d_in) bf16, in the workspace

    dL/dx = g W           G = g^T x, in the workspace      dL/dA, dL/dB from G: `factor_gradients`

Autograd keeps x, A and B, saved before the product is made (`held`). Traced by torch.compile the layer is one operator.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from curvelora.kernels.factor_gradients import gradients_of_factors
from curvelora.kernels.held import Held, add_product, held_input, saved
from curvelora.kernels.merged_weight import merged_weight
from curvelora.kernels.workspace import workspace
from curvelora.layers.dense_delta import DeltaMap, delta_map_of, map_fields


@torch.library.custom_op("curvelora::merged_linear", mutates_args=())
def _product(
    x: Tensor,
    A: Tensor,
    B: Tensor,
    bias: Tensor | None,
    base: list[Tensor],
    name: str,
    amplitude: float,
    frequency: float,
    scale: float,
    inside: bool,
) -> Tensor:
    return F.linear(x, _weight(A, B, base, name, amplitude, frequency, scale, inside), bias)


def _weight(A: Tensor, B: Tensor, base: list[Tensor], *fields: Any) -> Tensor:
    """W, in the workspace."""
    return merged_weight(A, B, delta_map_of(*fields), base, workspace(B.shape[0], A.shape[1], A.device))


@_product.register_fake
def _(x: Tensor, A: Tensor, B: Tensor, *rest: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], B.shape[0]))


@torch.library.custom_op("curvelora::merged_linear_gradients", mutates_args=())
def _gradients(
    grad: Tensor,
    x: Tensor,
    A: Tensor,
    B: Tensor,
    base: list[Tensor],
    needs_x: bool,
    needs_factors: bool,
    name: str,
    amplitude: float,
    frequency: float,
    scale: float,
    inside: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dL/dx, dL/dA, dL/dB); what is not needed is empty."""
    fields = (name, amplitude, frequency, scale, inside)
    d_out, d_in = B.shape[0], A.shape[1]
    g, x2 = grad.reshape(-1, d_out), x.reshape(-1, d_in)
    grad_x = (g @ _weight(A, B, base, *fields)).view(x.shape) if needs_x else grad.new_empty(0)
    if not needs_factors:
        return grad_x, A.new_empty(0), B.new_empty(0)
    return grad_x, *gradients_of_factors(g, x2, A, B, delta_map_of(*fields))


@_gradients.register_fake
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
    grad_x, grad_A, grad_B = _gradients(grad, *ctx.saved_tensors, ctx.base, needs_x, any(needs), *ctx.fields)
    factors = (grad_A, grad_B) if any(needs) else (None, None)
    return grad_x if needs_x else None, *factors, None, [None] * len(ctx.base), *(None for _ in ctx.fields)


_product.register_autograd(_backward, setup_context=_save)


class _Merged(torch.autograd.Function):
    """The product; what its backward pass needs is saved by the two `Held` that x and A come from."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, A: Tensor, B: Tensor, bias: Tensor | None, base: list[Tensor], fields: tuple
    ) -> Tensor:
        ctx.input, ctx.factors, ctx.base, ctx.fields = x.grad_fn, A.grad_fn, base, fields
        return _product(x, A, B, bias, base, *fields)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        needs_x, *needs = ctx.needs_input_grad[:3]
        (x,), (A, B) = saved(ctx.input), saved(ctx.factors)
        grad_x = None
        if needs_x:
            W = _weight(A, B, ctx.base, *ctx.fields)
            grad_x = add_product(ctx.input, grad.reshape(-1, B.shape[0]), W, x.shape)
        _, grad_A, grad_B = _gradients(grad, x, A, B, ctx.base, False, any(needs), *ctx.fields)
        return grad_x, *((grad_A, grad_B) if any(needs) else (None, None)), None, None, None


def merged_linear(
    x: Tensor, A: Tensor, B: Tensor, bias: Tensor | None, base: list[Tensor], delta_map: DeltaMap
) -> Tensor:
    """x (W0 + s f(BA))^T + bias: (..., d_out), bf16, differentiable in x, A and B.

    Args:
        x: (..., d_in), bf16.
        A, B: factors, (r, d_in) and (d_out, r), fp32.
        bias: (d_out,), bf16, or None; frozen.
        base: the NF4 weight, from `nf4.codes_of`.
        delta_map: with an `Activation` whose kernel exists (`curves.NAMES`).
    """
    fields = map_fields(delta_map)
    if torch.compiler.is_compiling() or not (torch.is_grad_enabled() and x.requires_grad and A.requires_grad):
        return _product(x, A, B, bias, base, *fields)
    return _Merged.apply(held_input(x), Held.apply(A, B), B, bias, base, fields)
