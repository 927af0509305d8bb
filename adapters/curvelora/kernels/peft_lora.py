"""PEFT's own LoRA layer on an NF4 base, with its pass as one fused product (`merged_linear` with the identity)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from curvelora.activations import Activation
from curvelora.kernels.choice import takes_kernels, why_not
from curvelora.layers.dense_delta import DeltaMap

try:
    from peft.tuners.lora.bnb import Linear4bit as _Linear4bit
except ImportError:  # PEFT has it where bitsandbytes is installed
    _Linear4bit = None


def _delta_map(layer: Any, adapter: str) -> DeltaMap:
    return DeltaMap(Activation("identity"), float(layer.scaling[adapter]))


def _why_not(layer: Any, training: bool) -> str | None:
    """Why no pass of this PEFT layer, in training or not, can be fused as it is now."""
    if len(layer.active_adapters) != 1 or layer.active_adapters[0] not in layer.lora_A:
        return "not one active adapter"
    (adapter,) = layer.active_adapters
    if adapter in layer.lora_variant:
        return "a variant of LoRA"
    if layer.lora_bias[adapter]:
        return "LoRA with a bias"
    if training and getattr(layer.lora_dropout[adapter], "p", 0.0) > 0:
        return "dropout on LoRA's input"
    return why_not(layer.get_base_layer(), layer.r[adapter])


if _Linear4bit is None:
    FusedLinear4bit = None
else:

    class FusedLinear4bit(_Linear4bit):
        """PEFT's layer with another forward pass; a layer becomes one, and its old self again, by its class alone."""

        @classmethod
        def switch(cls, layer: Any, mode: str) -> None:
            """Set the class for "auto" or "off"."""
            # a layer that cannot now may be able to later: its dropout does nothing in evaluation, an adapter is switched
            layer.__class__ = _Linear4bit if mode == "off" else cls

        @classmethod
        def why_no_kernels(cls, layer: Any) -> str | None:
            """Why the layer's passes in training are not fused; None where they are."""
            return _why_not(layer, training=True) if isinstance(layer, cls) else "kernels: off"

        def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            """x: (..., d_in) -> (..., d_out), as PEFT's, where a pass can be fused; else PEFT's."""
            if args or kwargs or self.disable_adapters or self.merged or _why_not(self, self.training) is not None:
                return super().forward(x, *args, **kwargs)
            (adapter,) = self.active_adapters
            A, B = self.lora_A[adapter].weight, self.lora_B[adapter].weight
            if not takes_kernels(x, A, B):
                return super().forward(x, *args, **kwargs)
            from curvelora.kernels.merged_linear import merged_linear
            from curvelora.kernels.nf4 import codes_of

            base = self.get_base_layer()
            bias = base.bias if base.bias is None else base.bias.to(torch.bfloat16)
            found = merged_linear(x.to(torch.bfloat16), A, B, bias, codes_of(base), _delta_map(self, adapter))
            return found.to(x.dtype)
