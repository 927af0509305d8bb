"""y = x W0^T + bias + drop(x) (s f(BA))^T as two products: a merged weight has no dropout, and LoRA's own second one is thin.

    x: (..., d_in) bf16   z = drop(x), or x where p = 0 (`dropout`)   dW = s f(BA): (d_out, d_in) bf16, in the workspace

    dL/dx = g W0 + drop(g dW), with the same mask    G = g^T z, in the workspace    dL/dA, dL/dB from G: `factor_gradients`

LoRA, where f is the identity, needs neither dW nor G: its products with dW are two thin ones each, of factors in bf16.

The update's product, small and rounded at its own size, is where the base's product is added inside of the matrix product: the
sum is rounded once, at a value that is on no number of bf16, so an update far below half a unit is right in the mean. In the
other order it would meet a y that is rounded already, and be lost in every entry (`merged_weight` has the same about W0).

Autograd keeps x, A, B and the mask's seed, saved ahead of the products as in `merged_linear`; z is formed again. This costs one
product more than `merged_linear` in every pass, for LoRA two thin ones and a pass over y.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from curvelora.kernels import nf4
from curvelora.kernels.dropout import add_dropped_, bands, dropped, new_seed
from curvelora.kernels.factor_gradients import gradients_of_factors, scaled_product, thin_back
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
from curvelora.kernels.rounded_factors import rounded_factors
from curvelora.kernels.workspace import LOCK, workspace
from curvelora.layers.dense_delta import DeltaMap, delta_map_of, map_fields


def _base(base: list[Tensor], d_out: int, d_in: int) -> Tensor:
    """W0 (d_out, d_in) in bf16: as it is stored, or decoded into the workspace."""
    return base[0] if len(base) == 1 else nf4.decoded(base, workspace(d_out, d_in, base[0].device))


def _update(A: Tensor, B: Tensor, *fields: Any) -> Tensor:
    """dW, in the workspace."""
    return merged_weight(A, B, delta_map_of(*fields), [], workspace(B.shape[0], A.shape[1], A.device))


def _low_rank(z: Tensor, A: Tensor, B: Tensor, *fields: Any) -> tuple[Tensor, Tensor]:
    """(P, Q) with z dW^T = P Q, the inner dimension as small as f allows."""
    f = delta_map_of(*fields)
    if f.activation.name == "identity":
        A, B = rounded_factors(A, B)
        return scaled_product(z, A.T, f.scale), B.T
    return z, _update(A, B, *fields).T


def _low_rank_back(g: Tensor, A: Tensor, B: Tensor, *fields: Any) -> tuple[Tensor, Tensor] | None:
    """(P, Q) with g dW = P Q where f is the identity; None where it is not."""
    f = delta_map_of(*fields)
    return thin_back(g, A, B, f.scale) if f.activation.name == "identity" else None


def _product(
    x: Tensor,
    seed: Tensor | None,
    A: Tensor,
    B: Tensor,
    bias: Tensor | None,
    base: list[Tensor],
    p: float,
    name: str,
    amplitude: float,
    frequency: float,
    scale: float,
    inside: bool,
) -> Tensor:
    d_out, d_in = B.shape[0], A.shape[1]
    x2 = x.reshape(-1, d_in)
    with LOCK, torch.cuda.device_of(x):
        y = x2.new_empty(x2.shape[0], d_out)
        # twice the one, then half of it beside the other: to add the whole of it, cuBLAS's kernels for Hopper round the product
        # to bf16 first and add in memory, and the update is lost as in the other order
        z = dropped(x2, seed, p) if p else x2
        y.addmm_(*_low_rank(z, A, B, name, amplitude, frequency, scale, inside), beta=0, alpha=2)
        y.addmm_(x2, _base(base, d_out, d_in).T, beta=0.5)
    if bias is not None:
        y += bias
    return y.view(*x.shape[:-1], d_out)


_product_operator = torch.library.custom_op("curvelora::separate_linear", _product, mutates_args=())


@_product_operator.register_fake
def _(x: Tensor, seed: Tensor | None, A: Tensor, B: Tensor, *rest: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], B.shape[0]))


def _gradients(
    grad: Tensor,
    x: Tensor,
    seed: Tensor | None,
    A: Tensor,
    B: Tensor,
    base: list[Tensor],
    needs_x: bool,
    needs_factors: bool,
    p: float,
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
    grad_x, factors = grad.new_empty(0), (A.new_empty(0), B.new_empty(0))
    with LOCK, torch.cuda.device_of(x):
        low_rank = _low_rank_back(g, A, B, *fields)
        if needs_factors:
            z = dropped(x2, seed, p) if p else x2
            factors = gradients_of_factors(g, z, A, B, delta_map_of(*fields), back_and_A=low_rank)
            del z
        if needs_x:
            grad_x = g @ _base(base, d_out, d_in)
            _add_update_product(grad_x, g, low_rank, seed, A, B, p, fields)
            grad_x = grad_x.view(x.shape)
    return grad_x, *factors


def _add_update_product(
    grad_x: Tensor,
    g: Tensor,
    low_rank: tuple[Tensor, Tensor] | None,
    seed: Tensor | None,
    A: Tensor,
    B: Tensor,
    p: float,
    fields: tuple,
) -> None:
    """Add drop(g dW) to `grad_x` (tokens, d_in). low_rank: from `_low_rank_back`."""
    left, right = low_rank or (g, _update(A, B, *fields))
    if not p:
        grad_x.addmm_(left, right)
        return
    for tokens in bands(*grad_x.shape):
        add_dropped_(grad_x[tokens], left[tokens] @ right, seed, p, tokens.start)


_gradients_operator = torch.library.custom_op("curvelora::separate_linear_gradients", _gradients, mutates_args=())


@_gradients_operator.register_fake
def _(
    grad: Tensor,
    x: Tensor,
    seed: Tensor | None,
    A: Tensor,
    B: Tensor,
    base: Any,
    needs_x: bool,
    needs_factors: bool,
    *rest: Any,
) -> Any:
    return (
        x.new_empty(x.shape if needs_x else 0),
        *(factor.new_empty(factor.shape if needs_factors else 0) for factor in (A, B)),
    )


def _save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, seed, A, B, _, ctx.base, *ctx.fields = inputs
    ctx.save_for_backward(x, seed, A, B)  # None stays None


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    needs_x, _, *needs = ctx.needs_input_grad[:4]
    grad_x, *factors = _gradients_operator(grad, *ctx.saved_tensors, ctx.base, needs_x, any(needs), *ctx.fields)
    factors = factors if any(needs) else (None, None)
    return grad_x if needs_x else None, None, *factors, None, [None] * len(ctx.base), *(None for _ in ctx.fields)


_product_operator.register_autograd(_backward, setup_context=_save)


class _Separate(torch.autograd.Function):
    """The products; x is from `held_input` and A from `held_factor`, who have saved what the backward pass needs."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        A: Tensor,
        B: Tensor,
        seed: Tensor | None,
        bias: Tensor | None,
        base: list[Tensor],
        p: float,
        fields: tuple,
        fp8: Asked | None,
    ) -> Tensor:
        ctx.input, ctx.factors, ctx.base, ctx.p = x.grad_fn, Factors(A, B), base, p
        ctx.fields, ctx.fp8 = fields, fp8
        if saves_itself():
            ctx.save_for_backward(x.detach())  # not as the view of a function's input that it is
        product = _product_operator if is_watched() else _product
        return product(x, seed, A, B, bias, base, p, *fields)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        needs_x, *needs = ctx.needs_input_grad[:3]
        (x,), (A, B, *seed) = saved(ctx.input, ctx.saved_tensors), ctx.factors.tensors()
        seed = seed[0] if seed else None
        grad_x = grad_A = grad_B = None
        g, x2 = grad.reshape(-1, B.shape[0]), x.reshape(-1, A.shape[1])
        with LOCK, torch.cuda.device_of(x):
            low_rank = _low_rank_back(g, A, B, *ctx.fields)
            if any(needs):  # first, and without z after it: see `merged_linear`
                z = dropped(x2, seed, ctx.p) if ctx.p else x2
                grad_A, grad_B = gradients_of_factors(g, z, A, B, delta_map_of(*ctx.fields), ctx.fp8, low_rank)
                del z
            if needs_x:
                grad_x = add_product(ctx.input, g, _base(ctx.base, B.shape[0], A.shape[1]), x.shape)
                _add_update_product(ctx.input.pending, g, low_rank, seed, A, B, ctx.p, ctx.fields)
        return grad_x, grad_A, grad_B, None, None, None, None, None, None


def separate_linear(
    x: Tensor,
    A: Tensor,
    B: Tensor,
    bias: Tensor | None,
    base: list[Tensor],
    delta_map: DeltaMap,
    p: float = 0.0,
    fp8: Asked | None = None,
) -> Tensor:
    """x W0^T + bias + drop(x) (s f(BA))^T: (..., d_out), bf16, differentiable in x, A and B.

    Args:
        x: (..., d_in), bf16, or another dtype, which is rounded to it, in training once for all that `held_input` joins.
        A, B: factors, (r, d_in) and (d_out, r), fp32.
        bias: (d_out,), bf16, or None; frozen.
        base: [W0] in bf16, or a 4-bit weight from `nf4.codes_of`; frozen.
        delta_map: with an `Activation` whose kernel exists (`curves.NAMES`).
        p: the probability with which an entry of x is dropped, in [0, 1).
        fp8: from `fp8_gate.asked`, or None.
    """
    fields = map_fields(delta_map)
    seed = None
    if p:
        x, seed = x.contiguous(), new_seed(x.device)  # entries are numbered by where they lie
    if not is_recorded(x, A, B):
        product = _product_operator if needs_operator(x) else _product
        return product(x.to(torch.bfloat16), seed, A, B, bias, base, p, *fields)
    held = held_factor(A, B, seed) if p else held_factor(A, B)
    return _Separate.apply(held_input(x), held, B, seed, bias, base, p, fields, fp8)
