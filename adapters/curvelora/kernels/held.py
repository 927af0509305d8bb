"""Saving for the backward pass ahead of the work, and one gradient for all layers that read the same input."""

from __future__ import annotations

import threading
import weakref
from typing import Any

import torch
from torch import Tensor


class Held(torch.autograd.Function):
    """The first of some tensors as it is; saves all of them for the functions that take it, who ask `saved` for them.

    Gradient checkpointing ends its second forward pass at the last tensor that the backward pass needs. A function saves after
    its own work is done; saved before it, the product of a block's last layer (Llama's down_proj, a fifth of all) is not made
    again.
    """

    @staticmethod
    def forward(ctx: Any, first: Tensor, *others: Tensor) -> Tensor:
        """`first`, as a view."""
        ctx.save_for_backward(first, *others)
        ctx.unpacked = None
        ctx.pending = None  # dL/dx so far, of those layers below that have had their turn
        return first.view_as(first)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient of `first` as it comes; the others get theirs from the function that took it."""
        ctx.unpacked = ctx.pending = None
        return grad, *(None for _ in ctx.needs_input_grad[1:])


def saved(node: Any) -> tuple[Tensor, ...]:
    """What `node`, the grad_fn of a `Held`'s result, has saved; for several askers, where a checkpoint unpacks only once."""
    if node.unpacked is None:
        node.unpacked = node.saved_tensors
    return node.unpacked


_last = threading.local()  # the recomputation of a checkpoint runs in a thread of autograd's


def held_input(x: Tensor) -> Tensor:
    """`Held` of a layer's input, the same one for layers that are called with the same tensor one after another (q, k and v)."""
    known = getattr(_last, "input", None)
    if known is not None and known[0]() is x and known[1] == x._version and torch.is_grad_enabled():
        return known[2]
    held = Held.apply(x)
    # x lives as long as its caller wants; what is held of it must not live longer
    _last.input = (weakref.ref(x, _forget), x._version, held) if held.grad_fn is not None else None
    return held


def _forget(reference: Any) -> None:
    known = getattr(_last, "input", None)
    if known is not None and known[0] is reference:
        _last.input = None


def add_product(node: Any, g: Tensor, W: Tensor, shape: torch.Size) -> Tensor | None:
    """g W as (part of) the gradient of what `node`, a `Held`, holds: None after the first time, when it went into the first one.

    Autograd would sum the gradients of q, k and v in passes of their own; a matrix product adds on its way.

    Args:
        g: (tokens, d_out).
        W: (d_out, d_in).
        shape: (..., d_in), of the input.
    """
    if node.pending is not None:
        node.pending.addmm_(g, W)
        return None
    node.pending = g @ W
    return node.pending.view(shape)
