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

The bounds of all layers are formed once for each pass of the model in training, since the factors move with every step: half way
through the forward pass, where the GPU has most work in its queue (asking hundreds of layers for their factors takes the host
milliseconds), or by the first layer of the backward pass where half of the layers were not called, or operators are watched. That
layer reads them, when they have long arrived. A layer takes bf16 where its factors are no parameters, or are others in its
forward pass, or have changed as autograd counts changes; writes through `.data`, DeepSpeed's steps among them, are seen by the
next pass of the model alone.
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
from curvelora.kernels.held import is_watched
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

    All layers of a pass are counted, as asking when its bounds are formed, and as allowed once its backward pass asks for any.
    """

    asked: int = 0
    allowed: int = 0
    products: int = 0


class _Look:
    """One pass of a model: the norms of its layers' factors, on their way from the GPU until somebody asks for them."""

    def __init__(self, count: Taken, layers: list[ref]) -> None:
        self.count = count
        self.layers = layers  # layers keep this, and it must not keep them
        self.calls_left = max(1, len(layers) // 2)
        # (layers as (id, `_which`, map, what is kept of A), their norms, when those have come), a device each
        self.norms: list[tuple[list[tuple[int, tuple, DeltaMap, float]], Tensor, torch.cuda.Event | None]] | None = None
        self.factors: list[tuple[Tensor, Tensor]] = []  # kept, or another one's might get the id of one that is gone
        self.found: dict[int, tuple] | None = None

    def called(self) -> None:
        """One of the layers is; `form` at half of them, where nobody watches, who would keep these operators' results."""
        self.calls_left -= 1
        if self.calls_left <= 0 and self.norms is None and not is_watched():
            with _LOCK:
                self.form()

    def form(self) -> None:
        """Have the GPUs look at the factors as they are now, if they have not been told to."""
        if self.norms is not None:
            return
        layers = [layer for known in self.layers if (layer := known()) is not None and layer.kernels == "fp8"]
        asking = [(layer, adapter, layer.factors(adapter)) for layer, adapter in map(_adapter_of, layers) if adapter]
        by_device: dict[torch.device, list[tuple[Any, str, tuple[Tensor, Tensor]]]] = {}
        for layer, adapter, (A, B) in asking:
            # what is made of parameters would be kept with all that it is made of
            if A.dtype == B.dtype == torch.float32 and A.is_leaf and B.is_leaf:
                by_device.setdefault(A.device, []).append((layer, adapter, (A, B)))
        self.norms = []
        for device, there in by_device.items():
            if why_no_fp8(device) is None:  # a model may have moved since `watch`
                pairs = [pair for *_, pair in there]
                known = [(id(layer), _which(adapter, *pair), *_map_of(layer, adapter)) for layer, adapter, pair in there]
                self.norms.append((known, *_on_its_way(factor_norms(pairs))))
                self.factors += pairs
        self.count.asked += len(self.factors)

    def allowed(self) -> dict[int, tuple]:
        """id -> `_which` of the layers that may take FP8; waits for the GPU the first time."""
        with _LOCK:  # a thread for each GPU runs backward passes
            if self.found is None:
                self.form()
                found = {}
                for layers, norms, arrived in self.norms:
                    if arrived is not None:
                        arrived.synchronize()
                    for (layer, which, f, kept), (of_A, of_B) in zip(layers, norms.tolist(), strict=True):
                        if slope_beyond_zero_bound(f, SLACK * of_A * of_B / kept) <= LIMIT:
                            found[layer] = which
                self.count.allowed += len(found)
                self.found = found
        return self.found


@dataclass
class Asked:
    """One pass of one layer, whose backward pass wants to know whether it may take FP8."""

    look: _Look
    layer: int
    which: tuple

    def granted(self) -> Taken | None:
        """Who counts the products in FP8; None where there are none."""
        return self.look.count if self.look.allowed().get(self.layer) == self.which else None


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
    """Begin a pass of `model`."""
    if _unreadable() or not torch.is_grad_enabled():
        return
    if model not in _LAYERS:
        _LAYERS[model] = [ref(layer) for layer in model.modules() if getattr(layer, "kernels", None) == "fp8"]
    layers = [layer for known in _LAYERS[model] if (layer := known()) is not None]
    if model.training:
        found = _Look(_TAKEN.setdefault(model, Taken()), _LAYERS[model])
        _LOOKS.update((layer, found) for layer in layers)
    else:
        for layer in layers:
            _LOOKS.pop(layer, None)


def _adapter_of(layer: Any) -> tuple[Any, str | None]:
    """The layer's one active adapter, if it can take FP8 where it takes kernels: the identity has LoRA's gradients."""
    adapter = layer._only_adapter()
    able = (
        adapter
        and getattr(layer.configs[adapter], "activation", None) != "identity"
        and layer.in_features % MULTIPLE == 0
    )
    return layer, adapter if able else None


def _map_of(layer: Any, adapter: str) -> tuple[DeltaMap, float]:
    """The layer's map, and by what `features` divides what it keeps of A."""
    config = layer.configs[adapter]
    return layer.delta_map(adapter), 1 - config.dropout if config.dropout_form == "features" else 1.0


def _on_its_way(norms: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """The same on the CPU, once the event has come."""
    if not norms.is_cuda:
        return norms, None
    with torch.cuda.device_of(norms):
        copy = torch.empty(norms.shape, dtype=norms.dtype, pin_memory=True).copy_(norms, non_blocking=True)
        return copy, torch.cuda.current_stream().record_event()


def _which(adapter: str, A: Tensor, B: Tensor) -> tuple:
    return adapter, id(A), id(B), A._version, B._version


def asked(layer: Any, adapter: str) -> Asked | None:
    """What the backward pass of this pass of `layer`, which takes kernels, asks; None where it takes no FP8 in any case."""
    if layer.kernels != "fp8" or _unreadable() or (look := _LOOKS.get(layer)) is None:
        return None
    look.called()  # without gradients too: so are layers the first time under a reentrant checkpoint
    return Asked(look, id(layer), _which(adapter, *layer.factors(adapter))) if torch.is_grad_enabled() else None
