"""PEFT's own LoRA layers, with their pass by `merged_linear` with the identity, or `separate_linear` where that cannot be.

On NF4 the pass is one product. With dropout, and on FP4 and in bf16, it is the base's product and two thin ones.
"""

from __future__ import annotations

from typing import Any

from peft.tuners.lora import Linear
from torch import Tensor, nn

from curvelora.activations import Activation
from curvelora.kernels.choice import has_hooks, takes_kernels, why_not
from curvelora.layers.dense_delta import DeltaMap

try:
    from peft.tuners.lora.bnb import Linear4bit
except ImportError:  # PEFT has it where bitsandbytes is installed
    Linear4bit = None


def _delta_map(layer: Any, adapter: str) -> DeltaMap:
    return DeltaMap(Activation("identity"), float(layer.scaling[adapter]))


def _why_not(layer: Any) -> str | None:
    """Why no pass of this PEFT layer can be fused as it is now."""
    if len(layer.active_adapters) != 1 or layer.active_adapters[0] not in layer.lora_A:
        return "not one active adapter"
    (adapter,) = layer.active_adapters
    if adapter in layer.lora_variant:
        return "a variant of LoRA"
    if layer.lora_bias[adapter]:
        return "LoRA with a bias"
    parts = layer.lora_A[adapter], layer.lora_B[adapter], layer.lora_dropout[adapter]
    if any(has_hooks(part) or "forward" in vars(part) for part in parts):
        return "LoRA's parts have hooks"
    if type(layer.lora_dropout[adapter]) not in (nn.Dropout, nn.Identity):
        return "another dropout than PyTorch's"
    if layer.base_layer is not layer.get_base_layer():
        return "an adapter around another one"
    return why_not(layer.get_base_layer(), layer.r[adapter])


def _fused(plain: type[nn.Module]) -> type[nn.Module]:
    """PEFT's layer class with another forward pass; a layer becomes one, and its old self again, by its class alone."""

    class Fused(plain):
        def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            """x: (..., d_in) -> (..., d_out), as PEFT's, where a pass can be fused; else PEFT's."""
            if args or kwargs or self.disable_adapters or self.merged or _why_not(self) is not None:
                return super().forward(x, *args, **kwargs)
            (adapter,) = self.active_adapters
            A, B = self.lora_A[adapter].weight, self.lora_B[adapter].weight
            base = self.get_base_layer()
            if not takes_kernels(base, x, A, B):
                return super().forward(x, *args, **kwargs)
            from curvelora.kernels.fused_output import fused_output

            dropout = self.lora_dropout[adapter]
            p = dropout.p if dropout.training and type(dropout) is nn.Dropout else 0.0
            return fused_output(base, x, A, B, _delta_map(self, adapter), p)

    Fused.__name__ = Fused.__qualname__ = f"Fused{plain.__name__}"
    return Fused


# PEFT wraps a 4-bit layer in the first where the model says that it was loaded in 4 bits, else in the second
_FUSED = {plain: _fused(plain) for plain in (Linear4bit, Linear) if plain is not None}
globals().update({fused.__name__: fused for fused in _FUSED.values()})  # pickle finds a class by its name
_PLAIN = {fused: plain for plain, fused in _FUSED.items()}


def is_lora_layer(module: nn.Module) -> bool:
    """Whether `switch` takes it."""
    return type(module) in _FUSED or type(module) in _PLAIN


def switch(layer: nn.Module, mode: str) -> None:
    """Have a PEFT layer fuse its passes where it can ("auto"), or never ("off")."""
    plain = _PLAIN.get(type(layer), type(layer))
    # one that cannot now may be able to later: adapters are switched
    layer.__class__ = plain if mode == "off" else _FUSED[plain]


def why_not_fused(layer: nn.Module) -> str | None:
    """Why a PEFT layer's passes are not fused as it is now; None where they are."""
    return _why_not(layer) if type(layer) in _PLAIN else "kernels: off"
