"""y = x W0^T + bias + z (s f(BA))^T where the two products cannot be one: dropout, or a base that would swallow the update.

    x: (..., d_in) bf16, the layer's input   z: (..., d_in) bf16, what the adapter sees of it: drop(x), or x itself
    dW = s f(BA): (d_out, d_in) bf16, in the workspace

    dL/dx = g W0    dL/dz = g dW    G = g^T z, in the workspace    dL/dA, dL/dB from G: `factor_gradients`

The update's product, small and rounded at its own size, is where the base's product is added inside of the matrix product: the
sum is rounded once, at a value that is on no number of bf16, so an update far below half a unit is right in the mean. In the
other order it would meet a y that is rounded already, and be lost in every entry (`merged_weight` has the same about W0).

Autograd keeps z, A and B, saved ahead of the products as in `merged_linear`; it needs no x, since W0 is frozen. Costs three
products more than LoRA over a step with gradient checkpointing, and one more than `merged_linear` in every pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from curvelora.activations import Activation
from curvelora.kernels import nf4
from curvelora.kernels.factor_gradients import gradients_of_factors
from curvelora.kernels.held import Held
from curvelora.kernels.merged_weight import merged_weight
from curvelora.kernels.workspace import workspace
from curvelora.layers.dense_delta import DeltaMap


def _base(base: list[Tensor], d_out: int, d_in: int) -> Tensor:
    """W0 (d_out, d_in) in bf16: as it is stored, or decoded into the workspace."""
    return base[0] if len(base) == 1 else nf4.decoded(base, workspace(d_out, d_in, base[0].device))


@torch.library.custom_op("curvelora::separate_linear", mutates_args=())
def _product(
    x: Tensor,
    z: Tensor,
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
    d_out, d_in = B.shape[0], A.shape[1]
    delta_map = DeltaMap(Activation(name, amplitude, frequency), scale, inside)
    y = z.reshape(-1, d_in) @ merged_weight(A, B, delta_map, [], workspace(d_out, d_in, x.device)).T
    y.addmm_(x.reshape(-1, d_in), _base(base, d_out, d_in).T)
    if bias is not None:
        y += bias
    return y.reshape(*x.shape[:-1], d_out)


@_product.register_fake
def _(x: Tensor, z: Tensor, A: Tensor, B: Tensor, *rest: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], B.shape[0]))


@torch.library.custom_op("curvelora::separate_linear_gradients", mutates_args=())
def _gradients(
    grad: Tensor,
    z: Tensor,
    A: Tensor,
    B: Tensor,
    base: list[Tensor],
    needs_x: bool,
    needs_z: bool,
    needs_factors: bool,
    name: str,
    amplitude: float,
    frequency: float,
    scale: float,
    inside: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dL/dx, dL/dz, dL/dA, dL/dB); what is not needed is empty."""
    delta_map = DeltaMap(Activation(name, amplitude, frequency), scale, inside)
    d_out, d_in = B.shape[0], A.shape[1]
    g = grad.reshape(-1, d_out)
    grad_x, grad_z = grad.new_empty(0), grad.new_empty(0)
    if needs_x:
        grad_x = (g @ _base(base, d_out, d_in)).reshape(z.shape)
    if needs_z:
        grad_z = (g @ merged_weight(A, B, delta_map, [], workspace(d_out, d_in, z.device))).reshape(z.shape)
    if not needs_factors:
        return grad_x, grad_z, A.new_empty(0), B.new_empty(0)
    return grad_x, grad_z, *gradients_of_factors(g, z.reshape(-1, d_in), A, B, delta_map)


@_gradients.register_fake
def _(
    grad: Tensor,
    z: Tensor,
    A: Tensor,
    B: Tensor,
    base: Any,
    needs_x: bool,
    needs_z: bool,
    needs_factors: bool,
    *rest: Any,
) -> Any:
    return (
        *(z.new_empty(z.shape if needed else 0) for needed in (needs_x, needs_z)),
        *(factor.new_empty(factor.shape if needs_factors else 0) for factor in (A, B)),
    )


def _only_needed(needs: tuple[bool, ...], found: tuple[Tensor, ...]) -> list[Tensor | None]:
    return [value if need else None for need, value in zip(needs, found, strict=True)]


def _save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    _, z, A, B, _, ctx.base, *ctx.map_fields = inputs
    ctx.save_for_backward(z, A, B)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    needs = ctx.needs_input_grad[:4]
    found = _gradients(grad, *ctx.saved_tensors, ctx.base, *needs[:2], any(needs[2:]), *ctx.map_fields)
    return *_only_needed(needs, found), None, [None] * len(ctx.base), *(None for _ in ctx.map_fields)


_product.register_autograd(_backward, setup_context=_save)


class _Separate(torch.autograd.Function):
    """The products, whose saved tensors are those of the `Held` that z comes from."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        held: Tensor,
        A: Tensor,
        B: Tensor,
        bias: Tensor | None,
        base: list[Tensor],
        map_fields: tuple,
    ) -> Tensor:
        ctx.held, ctx.base, ctx.map_fields = held.grad_fn, base, map_fields
        return _product(x, held, A, B, bias, base, *map_fields)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad[:4]
        found = _gradients(grad, *ctx.held.saved_tensors, ctx.base, *needs[:2], any(needs[2:]), *ctx.map_fields)
        return *_only_needed(needs, found), None, None, None


def separate_linear(
    x: Tensor, z: Tensor, A: Tensor, B: Tensor, bias: Tensor | None, base: list[Tensor], delta_map: DeltaMap
) -> Tensor:
    """x W0^T + bias + z (s f(BA))^T: (..., d_out), bf16, differentiable in x, z, A and B.

    Args:
        x, z: (..., d_in), bf16.
        A, B: factors, (r, d_in) and (d_out, r), fp32.
        bias: (d_out,), bf16, or None; frozen.
        base: [W0] in bf16, or the NF4 weight from `nf4.codes_of`; frozen.
        delta_map: with an `Activation` whose kernel exists (`curves.NAMES`).
    """
    f = delta_map.activation
    map_fields = (f.name, f.amplitude, f.frequency, delta_map.scale, delta_map.scale_inside)
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return _product(x, z, A, B, bias, base, *map_fields)
    held = Held.apply(z, A, B)
    if held.grad_fn is None:
        return _product(x, z, A, B, bias, base, *map_fields)
    return _Separate.apply(x, held, A, B, bias, base, map_fields)
