"""When a layer's gradients may take G from FP8: where what that can cost is bounded by what bf16 may have cost already.

    dL/dB = s (G f'(0) + G e(u)) A^T    e(u) = f'(u) - f'(0)

The first part is LoRA's, f'(0) g^T (x A^T), in bf16: g, x, A and x A^T are rounded by 2^-8 of themselves at most, which may cost
((1 + 2^-8)^4 - 1) |f'(0)| |g|^T |x| |A|^T. In the second part G is from `fp8_product`, off by ROUNDING |g|^T |x|. FP8 is taken
where that is no more:

    |e(u)| <= LIMIT |f'(0)|  for all u of the layer       LIMIT = ((1 + 2^-8)^4 - 1) / ROUNDING = 0.122

|u_ij| <= |B_i| |A_j| (Cauchy-Schwarz), so the largest row of B times the largest column of A bounds all u, and each f has a
bound on e, written in `_BEYOND`. Sinter at its published setting passes until some |u| may reach 0.24. Nothing of e is
skipped, however small. What is left to the data: `fp8_product` makes zeros of entries below some 2^-18 of their column's largest
one, and says what small entries add; g and x are not looked at.

The bounds of all layers are formed at the start of each pass of the model in training, since the factors move with every step,
and read by the first layer of the backward pass, when they have long arrived. A layer takes bf16 where its factors are others in
its forward pass, or have changed as autograd counts changes; writes through `.data`, DeepSpeed's steps among them, are seen by
the next pass of the model alone.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn

from curvelora.activations import SWISH_BETA, Activation
from curvelora.errors import UserError
from curvelora.kernels.choice import ENVIRONMENT, environment_mode, why_nowhere
from curvelora.kernels.factor_norms import factor_norms
from curvelora.kernels.fp8_product import MULTIPLE, ROUNDING
from curvelora.layers.dense_delta import DeltaMap

LIMIT = ((1 + 2**-8) ** 4 - 1) / ROUNDING
SLACK = 1 + 1e-4  # norms are fp32, and u in the kernels is within 2^-16 of |B_i| |A_j|
NEEDED = (8, 9)  # compute capability

# name -> a bound on |f'(u) - f'(0)| for |u| <= U, increasing in U
_BEYOND = {
    "sinter": lambda f, U: f.amplitude * (1 + f.frequency * U),  # a (sin z + z cos z)
    "cos": lambda f, U: 1.5 * (f.frequency * U) ** 2,  # cos z - 1 >= -z^2 / 2, z sin z <= z^2
    "tanh": lambda f, U: U**2,
    "sigmoid": lambda f, U: (U / 4) ** 2,
    "silu": lambda f, U: U / 2,  # y - 1/2 <= U / 4, y (1 - y) <= 1 / 4
    "swish": lambda f, U: SWISH_BETA * U / 2,
    "gaussian": lambda f, U: 1.5 * U**2,  # t = u^2: the slope of (1/2 - t) exp(-t) is at most 3/2 in size
}


@dataclass
class Taken:
    """How often FP8 was asked for and allowed, in layers summed over passes, and how many products it then made.

    A layer is counted as allowed once a backward pass of the model has asked for any layer.
    """

    asked: int = 0
    allowed: int = 0
    products: int = 0


class _Look:
    """What one pass of a model found: the norms of its factors, on their way from the GPU until somebody asks for them."""

    def __init__(self, count: Taken, asking: list[tuple[Any, str, tuple[Tensor, Tensor]]]) -> None:
        self.count = count
        self.which = {id(layer): _which(adapter, *pair) for layer, adapter, pair in asking}
        self.factors = [pair for *_, pair in asking]  # kept, or another one's might get the id of one that is gone
        # layers keep this, and it must not keep them
        self.asking = [(ref(layer), adapter) for layer, adapter, _ in asking]
        by_device: dict[torch.device, list[int]] = {}
        for number, (*_, (A, _)) in enumerate(asking):
            by_device.setdefault(A.device, []).append(number)
        self.norms = [
            (numbers, *_on_its_way(factor_norms([asking[number][2] for number in numbers])))
            for numbers in by_device.values()
        ]
        self.found: set[int] | None = None

    def allowed(self) -> set[int]:
        """ids of the layers that may take FP8; waits for the GPU the first time."""
        with _LOCK:  # a thread for each GPU runs backward passes
            if self.found is None:
                found = set()
                for numbers, norms, arrived in self.norms:
                    if arrived is not None:
                        arrived.synchronize()
                    for number, (of_A, of_B) in zip(numbers, norms.tolist(), strict=True):
                        layer, adapter = self.asking[number][0](), self.asking[number][1]
                        if layer is not None and _is_bounded(layer, adapter, SLACK * of_A * of_B):
                            found.add(id(layer))
                self.found = found
                self.count.allowed += len(found)
        return self.found


@dataclass
class Asked:
    """One pass of one layer, whose backward pass wants to know whether it may take FP8."""

    look: _Look
    layer: int

    def granted(self) -> Taken | None:
        """Who counts the products in FP8; None where there are none."""
        return self.look.count if self.layer in self.look.allowed() else None


_LOCK = threading.Lock()
# layer -> the last pass of its model; model -> who counts; model -> its layers, for which all modules would be looked at
_LOOKS: WeakKeyDictionary[nn.Module, _Look] = WeakKeyDictionary()
_TAKEN: WeakKeyDictionary[nn.Module, Taken] = WeakKeyDictionary()
_LAYERS: WeakKeyDictionary[nn.Module, list[ref]] = WeakKeyDictionary()


def slope_beyond_zero_bound(delta_map: DeltaMap, largest: float) -> float:
    """A bound on |f'(u) - f'(0)| / |f'(0)| for |u| <= `largest`; infinite where f'(0) = 0 or f has none.

    Args:
        largest: of |BA|, before a scale inside of f.
    """
    f = delta_map.activation
    if not isinstance(f, Activation) or f.name not in _BEYOND:
        return float("inf")
    inner = abs(delta_map.scale) if delta_map.scale_inside else 1.0
    return abs(_BEYOND[f.name](f, inner * largest) / f.slope_at_zero)


def why_no_fp8(device: torch.device) -> str | None:
    """Why there are no kernels with products in FP8 on `device`; None where there are."""
    if environment_mode() == "off":
        return f"{ENVIRONMENT}=off leaves kernels out"
    if (reason := why_nowhere(device)) is not None:
        return f"there are no kernels: {reason}"
    if device.type == "cpu" or torch.cuda.get_device_capability(device) >= NEEDED:
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return f"a GPU of capability {major}.{minor} has no FP8, which needs {NEEDED[0]}.{NEEDED[1]} (Ada, Hopper)"


def watch(model: nn.Module) -> None:
    """Have every pass of `model` in training decide for those layers whose `kernels` is "fp8" in its first one.

    Raises:
        UserError: it is where there are no products in FP8.
    """
    unwatch(model)
    for device in {parameter.device for parameter in model.parameters()} - {torch.device("meta")}:
        if (reason := why_no_fp8(device)) is not None:
            raise UserError(f"kernels fp8: {reason}: write auto")
    model.register_forward_pre_hook(look)
    _TAKEN[model] = Taken()


def unwatch(model: nn.Module) -> None:
    """Undo `watch`; nothing where it was not called."""
    for key in [key for key, hook in model._forward_pre_hooks.items() if hook is look]:
        del model._forward_pre_hooks[key]
    _TAKEN.pop(model, None)
    _LAYERS.pop(model, None)


def taken(model: nn.Module) -> Taken | None:
    """How often FP8 has been taken in `model` so far; None where nobody watches it."""
    return _TAKEN.get(model)


def _unreadable() -> bool:
    """Whether nothing can be read from the GPU now."""
    return torch.compiler.is_compiling() or (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing())


def look(model: nn.Module, _: Any = None) -> None:
    """Form the bounds of all layers of `model`, as their factors are now; the backward pass decides by them."""
    if _unreadable() or not torch.is_grad_enabled():
        return
    if model not in _LAYERS:
        _LAYERS[model] = [ref(layer) for layer in model.modules() if getattr(layer, "kernels", None) == "fp8"]
    layers = [layer for known in _LAYERS[model] if (layer := known()) is not None and layer.kernels == "fp8"]
    for layer in layers:
        _LOOKS.pop(layer, None)
    if not model.training:
        return
    asking = [(layer, adapter, layer.factors(adapter)) for layer, adapter in map(_adapter_of, layers) if adapter]
    # a model may have moved since `watch`
    able = {device: why_no_fp8(device) is None for device in {A.device for _, _, (A, _) in asking}}
    asking = [
        (layer, adapter, (A, B))
        for layer, adapter, (A, B) in asking
        if able[A.device] and A.dtype == B.dtype == torch.float32
    ]
    count = _TAKEN.setdefault(model, Taken())
    count.asked += len(asking)
    if asking:
        found = _Look(count, asking)
        _LOOKS.update((layer, found) for layer, *_ in asking)


def _adapter_of(layer: Any) -> tuple[Any, str | None]:
    """The layer's one active adapter, if it can take FP8 where it takes kernels: the identity has LoRA's gradients."""
    adapter = layer._only_adapter()
    able = (
        adapter
        and getattr(layer.configs[adapter], "activation", None) != "identity"
        and layer.in_features % MULTIPLE == 0
    )
    return layer, adapter if able else None


def _is_bounded(layer: Any, adapter: str, largest: float) -> bool:
    """Whether the limit holds for |BA| up to `largest`."""
    if (config := layer.configs.get(adapter)) is None:  # deleted since
        return False
    # what is kept of A is divided by this
    spread = 1 - config.dropout if config.dropout_form == "features" else 1.0
    return slope_beyond_zero_bound(layer.delta_map(adapter), largest / spread) <= LIMIT


def _on_its_way(norms: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """The same on the CPU, once the event has come."""
    if not norms.is_cuda:
        return norms, None
    with torch.cuda.device_of(norms):
        copy = torch.empty(norms.shape, dtype=norms.dtype, pin_memory=True).copy_(norms, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
    return copy, event


def _which(adapter: str, A: Tensor, B: Tensor) -> tuple:
    return adapter, id(A), id(B), A._version, B._version


def asked(layer: Any, adapter: str) -> Asked | None:
    """What the backward pass of this pass of `layer`, which takes kernels, asks; None where it takes no FP8 in any case."""
    if layer.kernels != "fp8" or _unreadable() or not torch.is_grad_enabled() or (look := _LOOKS.get(layer)) is None:
        return None
    return Asked(look, id(layer)) if look.which.get(id(layer)) == _which(adapter, *layer.factors(adapter)) else None
