"""Activation-space family ("bottleneck map"): h = W0 x - C x + B m(A drop(x)) with m: R^r -> R^r, linear or not.

    x: (..., d_in)   A: (r, d_in)   z = A x: (..., r)   B: (d_out, r)   C = B0 A0

Everything between A and B, scale included, is the method's `bottleneck`: for RanLoRA s v * phi(z), for AuroRA s sigma(z). C is
what the init took out of the weight and gave to A and B (arXiv 2404.02948, RanLoRA eq. 4-7); its two factors are stored with
the adapter and frozen, so the base weight is never written, and the adapter alone restores the model. C x sees no dropout: it
belongs to the base.

The products with A and B run in the dtype in which the base layer multiplies, m in fp32 also under autocast (fp64 for fp64
factors).
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from peft.tuners._buffer_dict import BufferDict
from torch import Tensor, nn
from torch.nn import functional as F

from curvelora.layers.adapter_layer import AdapterLayer
from curvelora.precision import at_least_fp32, compute_dtype, exact_products


class BottleneckLayer(AdapterLayer):
    """A linear layer with bottleneck adapters.

    A subclass names its tensors: `adapter_layer_names` begins with A and B, `removed_names` are A0 and B0 where its inits remove
    something. The config of an adapter has r and dropout.
    """

    removed_names: tuple[str, ...] = ()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.other_param_names = (*self.other_param_names, *self.removed_names)
        for name in self.removed_names:
            setattr(self, name, BufferDict({}, persistent=True))

    @abstractmethod
    def bottleneck(self, adapter: str, z: Tensor) -> Tensor:
        """m(z) times the scale. z: (..., r) -> (..., r), fp32 or wider."""

    def acts_on_weights(self, adapter: str) -> bool:
        """Whether m is applied to the columns of A once, instead of to A x for every token, which makes the adapter linear."""
        return self.in_merged_form

    def set_tensors(self, adapter: str, tensors: dict[str, Tensor], frozen: dict[str, Tensor] | None = None) -> None:
        """Give `adapter` its trainable tensors and its frozen ones, by attribute name."""
        # contiguous: DeepSpeed sends parameters as bytes, and a transposed one has none to send
        for name, value in tensors.items():
            getattr(self, name)[adapter] = nn.Parameter(value.contiguous())
        for name, value in (frozen or {}).items():
            getattr(self, name)[adapter] = value.contiguous()

    def factors(self, adapter: str) -> tuple[Tensor, Tensor]:
        """(A, B) of `adapter`, shapes (r, d_in) and (d_out, r)."""
        A, B = (getattr(self, name)[adapter] for name in self.adapter_layer_names[:2])
        return A, B

    def removed(self, adapter: str) -> tuple[Tensor, Tensor] | None:
        """(A0, B0) with C = B0 A0, shapes as `factors`; None where the init removed nothing."""
        if not self.removed_names or adapter not in getattr(self, self.removed_names[0]):
            return None
        A0, B0 = (getattr(self, name)[adapter] for name in self.removed_names)
        return A0, B0

    def adapter_output(self, adapter: str, x: Tensor) -> Tensor:
        """B m(A drop(x)) - B0 A0 x. x: (..., d_in) -> (..., d_out), in the dtype in which a linear layer multiplies x."""
        config, (A, B), removed = self.configs[adapter], self.factors(adapter), self.removed(adapter)
        dtype = compute_dtype(x)
        x = x.to(dtype)
        on_weights = self.acts_on_weights(adapter)
        if on_weights:
            A = self.mapped_A(adapter)
        dropping = self.training and config.dropout > 0
        if removed is None:
            z = F.linear(F.dropout(x, config.dropout, dropping), A.to(dtype))
        elif dropping:
            z = F.linear(F.dropout(x, config.dropout), A.to(dtype))
            z0 = F.linear(x, removed[0].to(dtype))
        else:  # x is read once
            z, z0 = F.linear(x, torch.cat([A, removed[0]]).to(dtype)).split(config.r, dim=-1)
        if not on_weights:
            z = self.mapped(adapter, z).to(dtype)
        if removed is not None:
            # one product for both terms: their difference is rounded once
            z, B = torch.cat([z, -z0], -1), torch.cat([B, removed[1]], 1)
        return F.linear(z, B.to(dtype))

    def mapped(self, adapter: str, z: Tensor) -> Tensor:
        """m(z) in fp32 (fp64 for fp64 input), whatever the dtype of z and autocast: (..., r) -> (..., r)."""
        with torch.autocast(z.device.type, enabled=False):
            return self.bottleneck(adapter, z.to(at_least_fp32(z.dtype)))

    def mapped_A(self, adapter: str) -> Tensor:
        """m applied to each column of A, a vector of R^r: (r, d_in), fp32 or wider."""
        A, _ = self.factors(adapter)
        return self.mapped(adapter, A.T).T

    def delta_weight(self, adapter: str) -> Tensor:
        """B m(A) - B0 A0: (d_out, d_in), fp32 or wider; the update itself where m is linear, AuroRA's merged form where not."""
        (_, B), removed = self.factors(adapter), self.removed(adapter)
        work = at_least_fp32(B.dtype)
        with exact_products(B.device):
            delta = B.to(work) @ self.mapped_A(adapter)
            return delta if removed is None else delta - removed[1].to(work) @ removed[0].to(work)
