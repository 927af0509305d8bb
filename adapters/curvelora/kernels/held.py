"""Saving for the backward pass ahead of the work, and one gradient for all layers that read the same input."""

from __future__ import annotations

import weakref
from threading import get_ident
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from curvelora.kernels.workspace import stream_of


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
        ctx.task = None  # the backward pass that the next two belong to: not each ends here, as one for the factors alone
        ctx.unpacked = None
        ctx.pending = None  # dL/dx so far, of those layers below that have had their turn
        ctx.walked = False  # whether a backward pass has been here: what was saved may be gone
        return first.view_as(first)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient of `first` as it comes; the others get theirs from the function that took it."""
        ctx.task = ctx.unpacked = ctx.pending = None
        ctx.walked = True
        return grad, *(None for _ in ctx.needs_input_grad[1:])


def saved(node: Any, own: tuple[Tensor, ...] = ()) -> tuple[Tensor, ...]:
    """What `node`, the grad_fn of a `Held`'s result, has saved; for several askers, where a checkpoint unpacks only once.

    Args:
        own: what the asker has saved itself, and gets.
    """
    global _last
    task = torch._C._current_graph_task_id()
    if node.task != task:
        node.unpacked = node.pending = None
        node.task = task
    if not own and node.unpacked is None:
        node.unpacked = node.saved_tensors
    _last = None  # where a checkpoint has just run its layers again, its last input is not needed any more
    return own or node.unpacked


def saves_itself() -> bool:
    """Whether a function saves its input beside `Held`, which costs nothing where no hook packs what is saved.

    So do plain layers, and the losses of q, k and v can be differentiated one after the other: each pass frees its own. Under
    checkpoints and hooks there is one for all of them.
    """
    return _top_hooks(False) is None


def held_factor(A: Tensor, B: Tensor, *others: Tensor) -> Tensor:
    """A, or `Held` of all where autograd has to save one: parameters are there anyway, and saving takes the CPU's time."""
    return A if A.is_leaf and B.is_leaf and not others else Held.apply(A, B, *others)


class Factors:
    """The factors between forward and backward pass: parameters as they are, others in the `Held` that A comes from."""

    def __init__(self, A: Tensor, B: Tensor) -> None:
        self.node = A.grad_fn
        self.leaves = (A, B) if self.node is None else None
        self.versions = (A._version, B._version)

    def tensors(self) -> tuple[Tensor, ...]:
        """What `held_factor` was given.

        Raises:
            RuntimeError: a parameter was changed in place since, as autograd raises it for what it saves.
        """
        if self.leaves is None:
            return saved(self.node)
        if self.versions != tuple(factor._version for factor in self.leaves):
            raise RuntimeError("a factor of an adapter was changed between the forward and the backward pass")
        return self.leaves


def is_watched() -> bool:
    """Whether something looks at the operators that are called: selective checkpointing keeps results by operator.

    Otherwise a layer calls its functions without the operator around them, which would take as much of the CPU's time again.
    """
    return is_in_torch_dispatch_mode()


# The last call of `held_input`, in whichever thread it was, since a checkpoint is recomputed in autograd's: one for all threads,
# so that a pass frees what the pass before it has left.
_last: tuple[Any, ...] | None = None
_top_hooks = torch._C._autograd._top_saved_tensors_default_hooks


def held_input(x: Tensor) -> Tensor:
    """`Held` of a layer's input in bf16, the same one for layers that are called with one tensor one after another (q, k and v).

    They share it within one and the same pass, since a checkpoint counts what is saved inside of it, the first time and again,
    in one thread and on one stream, where their products are added in turn. An x whose `.data` was replaced is not noticed.

    Args:
        x: (..., d_in), requires a gradient, with gradients enabled.
    """
    global _last
    hooks = _top_hooks(False)
    pack = None if hooks is None else hooks[0]
    state = x._version, stream_of(x.device), get_ident()
    if (last := _last) is not None:  # which another thread may take away
        tensor, known, packed_by, held = last
        same = tensor() is x and known == state and (packed_by and packed_by()) is pack
        if same and not held.grad_fn.walked:
            return held
    held = Held.apply(x.to(torch.bfloat16))
    # x and the pass may end any time; the result stays until the next pass, with or without gradients, or the backward pass
    _last = weakref.ref(x), state, pack and weakref.ref(pack), held
    return held


def is_recorded(x: Tensor, A: Tensor, B: Tensor) -> bool:
    """Whether a pass is recorded by this file's functions; else, with `needs_operator`, by none or by its operator."""
    trains = x.requires_grad and (A.requires_grad or B.requires_grad)
    return trains and torch.is_grad_enabled() and not torch.compiler.is_compiling()


def needs_operator(x: Tensor) -> bool:
    """Whether a pass that is not recorded here calls its operator: somebody looks for that, or wants one gradient of it.

    Lets go of the last call's result, and with it of the graph before it: a pass without gradients may have begun.
    """
    global _last
    if torch.compiler.is_compiling():
        return True
    _last = None
    return torch.is_grad_enabled() or is_watched() or type(x) is not Tensor


def refuse_second_derivative() -> None:
    """Raise `RuntimeError` in a backward pass that is to be differentiated itself (create_graph)."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            "fused adapter layers have no second derivative: compute inside `curvelora.reference_path.reference_path(model)`"
        )


def add_product(node: Any, g: Tensor, W: Tensor, shape: torch.Size) -> Tensor | None:
    """g W as (part of) the gradient of what `node`, a `Held`, holds: None after the first time, when it went into the first one.

    Autograd would sum the gradients of q, k and v in passes of their own; a matrix product adds on its way.
    `saved` has been asked in this pass.

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
