"""When a layer's gradients may take G from FP8: where what that can cost is bounded by what bf16 may have cost already.

    dL/dB = s (G f'(0) + G e(u)) A^T    e(u) = f'(u) - f'(0)

The first part is LoRA's, f'(0) g^T (x A^T), in bf16: g, x, A and x A^T are rounded by 2^-8 of themselves at most, which may cost
((1 + 2^-8)^4 - 1) |f'(0)| |g|^T |x| |A|^T. In the second part G is from `fp8_product`, off by ROUNDING |g|^T |x| at most. FP8 is
taken where it cannot cost more than the first part's roundings can:

    |e(u)| <= LIMIT |f'(0)|  for all u of the layer       LIMIT = ((1 + 2^-8)^4 - 1) / ROUNDING = 0.122

|u_ij| <= |B_i| |A_j| (Cauchy-Schwarz), so the largest row of B times the largest column of A bounds all u, and each f has a
bound on e, written in `_BEYOND`. Sinter at its published setting passes until some |u| may reach 0.24. Nothing of e is
skipped, however small.

The bounds of all layers are read from the GPU at the start of each pass of the model in training: one wait a pass, since the
factors move with every step. A layer whose factors have been changed since, or whose model was not called itself, takes bf16.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from curvelora.activations import SWISH_BETA, Activation
from curvelora.errors import UserError
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
    """How often FP8 was allowed: layers, summed over the passes that asked."""

    allowed: int = 0
    asked: int = 0


_ALLOWED: WeakKeyDictionary[nn.Module, tuple[int, int]] = WeakKeyDictionary()  # layer -> its factors' versions
_TAKEN: WeakKeyDictionary[nn.Module, Taken] = WeakKeyDictionary()  # model


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
    """Why GPUs like `device` have no products in FP8; None where they do, and for a CPU, which emulates them."""
    if device.type == "cpu" or torch.cuda.get_device_capability(device) >= NEEDED:
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return (
        f"a GPU of capability {major}.{minor}, and FP8 needs {NEEDED[0]}.{NEEDED[1]} (Ada, Hopper): write kernels auto"
    )


def watch(model: nn.Module) -> None:
    """Have every pass of `model` in training decide for its layers whose `kernels` is "fp8".

    Raises:
        UserError: its GPU has no products in FP8.
    """
    unwatch(model)
    for device in {parameter.device for parameter in model.parameters()}:
        if device.type in ("cpu", "cuda") and (reason := why_no_fp8(device)) is not None:
            raise UserError(f"kernels fp8: {reason}")
    model.register_forward_pre_hook(look)
    _TAKEN[model] = Taken()


def unwatch(model: nn.Module) -> None:
    """Undo `watch`; nothing where it was not called."""
    for key in [key for key, hook in model._forward_pre_hooks.items() if hook is look]:
        del model._forward_pre_hooks[key]
    _TAKEN.pop(model, None)


def taken(model: nn.Module) -> Taken | None:
    """How often FP8 has been allowed in `model` so far; None where nobody watches it."""
    return _TAKEN.get(model)


def _quiet() -> bool:
    """Whether nothing can be read from the GPU now, or there will be no gradients."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return True
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def look(model: nn.Module, _: Any = None) -> None:
    """Decide for all layers of `model`, as their factors are now."""
    if _quiet() or not model.training:
        return
    asked, bounds = [], []
    for layer in model.modules():
        if getattr(layer, "kernels", None) != "fp8":
            continue
        _ALLOWED.pop(layer, None)
        adapter = layer._only_adapter()
        if adapter is None or layer.why_no_kernels() is not None or layer.in_features % MULTIPLE:
            continue
        if layer.delta_map(adapter).activation.name == "identity":  # LoRA's gradients, which have no other part
            continue
        asked.append((layer, adapter))
        bounds.append(_largest(*layer.factors(adapter)).to(bounds[0].device if bounds else None))
    if not asked:
        return
    count = _TAKEN.setdefault(model, Taken())
    for (layer, adapter), bound in zip(asked, torch.stack(bounds).tolist(), strict=True):
        config = layer.configs[adapter]
        spread = (
            1 - config.dropout if config.dropout_form == "features" else 1.0
        )  # what is kept of A is divided by this
        count.asked += 1
        if slope_beyond_zero_bound(layer.delta_map(adapter), SLACK * bound / spread) <= LIMIT:
            count.allowed += 1
            _ALLOWED[layer] = _versions(layer, adapter)


@torch.no_grad()
def _largest(A: Tensor, B: Tensor) -> Tensor:
    """A bound on all |(BA)_ij|: the largest column of A times the largest row of B."""
    return torch.linalg.vector_norm(A, dim=0).amax() * torch.linalg.vector_norm(B, dim=1).amax()


def _versions(layer: Any, adapter: str) -> tuple[int, int]:
    A, B = layer.factors(adapter)
    return A._version, B._version


def allows(layer: Any, adapter: str) -> bool:
    """Whether this pass of `layer` may take G from FP8."""
    if layer.kernels != "fp8" or _quiet():
        return False
    return _ALLOWED.get(layer) == _versions(layer, adapter)
