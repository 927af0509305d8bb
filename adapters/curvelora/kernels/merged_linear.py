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

from curvelora.activations import Activation
from curvelora.kernels.factor_gradients import gradients_of_factors
from curvelora.kernels.held import Held
from curvelora.kernels.merged_weight import merged_weight
from curvelora.kernels.workspace import workspace
from curvelora.layers.dense_delta import DeltaMap


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
    delta_map = DeltaMap(Activation(name, amplitude, frequency), scale, inside)
    W = merged_weight(A, B, delta_map, base, workspace(B.shape[0], A.shape[1], x.device))
    return F.linear(x, W, bias)


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
    delta_map = DeltaMap(Activation(name, amplitude, frequency), scale, inside)
    d_out, d_in = B.shape[0], A.shape[1]
    g, x2 = grad.reshape(-1, d_out), x.reshape(-1, d_in)
    grad_x = grad.new_empty(0)
    if needs_x:
        grad_x = (g @ merged_weight(A, B, delta_map, base, workspace(d_out, d_in, x.device))).reshape(x.shape)
    if not needs_factors:
        return grad_x, A.new_empty(0), B.new_empty(0)
    return grad_x, *gradients_of_factors(g, x2, A, B, delta_map)


@_gradients.register_fake
def _(grad: Tensor, x: Tensor, A: Tensor, B: Tensor, base: Any, needs_x: bool, needs_factors: bool, *rest: Any) -> Any:
    return (
        x.new_empty(x.shape if needs_x else 0),
        A.new_empty(A.shape if needs_factors else 0),
        B.new_empty(B.shape if needs_factors else 0),
    )


def _save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, A, B, _, ctx.base, *ctx.map_fields = inputs
    ctx.save_for_backward(x, A, B)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    needs_x, *needs = ctx.needs_input_grad[:3]
    grad_x, grad_A, grad_B = _gradients(grad, *ctx.saved_tensors, ctx.base, needs_x, any(needs), *ctx.map_fields)
    factors = (grad_A, grad_B) if any(needs) else (None, None)
    return grad_x if needs_x else None, *factors, None, [None] * len(ctx.base), *(None for _ in ctx.map_fields)


_product.register_autograd(_backward, setup_context=_save)


class _Merged(torch.autograd.Function):
    """The product, whose saved tensors are those of the `Held` before it."""

    @staticmethod
    def forward(
        ctx: Any, held: Tensor, A: Tensor, B: Tensor, bias: Tensor | None, base: list[Tensor], map_fields: tuple
    ) -> Tensor:
        ctx.held, ctx.base, ctx.map_fields = held.grad_fn, base, map_fields
        return _product(held, A, B, bias, base, *map_fields)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        needs_x, *needs = ctx.needs_input_grad[:3]
        grad_x, grad_A, grad_B = _gradients(
            grad, *ctx.held.saved_tensors, ctx.base, needs_x, any(needs), *ctx.map_fields
        )
        return grad_x if needs_x else None, *((grad_A, grad_B) if any(needs) else (None, None)), None, None, None


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
    f = delta_map.activation
    map_fields = (f.name, f.amplitude, f.frequency, delta_map.scale, delta_map.scale_inside)
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return _product(x, A, B, bias, base, *map_fields)
    held = Held.apply(x, A, B)
    if held.grad_fn is None:  # nothing here trains
        return _product(x, A, B, bias, base, *map_fields)
    return _Merged.apply(held, A, B, bias, base, map_fields)
