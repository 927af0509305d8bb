"""What every adapter layer of this project shares: parameters per adapter, switching, merging.

A family subclasses `AdapterLayer` and says three things: which tensors an adapter has (`create_parameters`), what it adds to
the output (`adapter_output`), and, where it merges, what it adds to the weight (`delta_weight`).
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from peft.utils.quantization_utils import resolve_quantization_backend
from torch import Tensor, nn

from curvelora.errors import UserError
from curvelora.layers.base_weight import is_reordered_4bit, is_transposed, linear_shape, snapshot
from curvelora.precision import at_least_fp32


class AdapterLayer(nn.Module, BaseTunerLayer):
    """A frozen linear layer with any number of adapters on it.

    The base layer is called, never rewritten, so whatever PEFT can wrap serves as a base: fp32, bf16, NF4, int8.

    Args:
        base_layer: the layer to adapt; d_in inputs, d_out outputs.
        name: its name in the model, for messages.
    """

    adapter_layer_names: tuple[str, ...] = ()
    other_param_names: tuple[str, ...] = ("configs",)

    def __init__(self, base_layer: nn.Module, name: str) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.name = name
        self.in_features, self.out_features = linear_shape(self.get_base_layer(), name)
        self.quantization_backend = resolve_quantization_backend(self.get_base_layer())
        self.configs: dict[str, Any] = {}
        self.merged_adapters: list[str] = []
        self._disable_adapters = False
        self._active_adapter: list[str] = []
        self._restore_base = None
        for parameter in self.adapter_layer_names:
            setattr(self, parameter, nn.ParameterDict())

    # --- what a family defines -----------------------------------------------------------------------------------------

    @abstractmethod
    def create_parameters(self, adapter: str, config: Any) -> None:
        """Create and initialise the tensors of `adapter` (fp32, on any device; they are moved afterwards)."""

    @abstractmethod
    def adapter_output(self, adapter: str, x: Tensor) -> Tensor:
        """What `adapter` adds to the base layer's output. x: (..., d_in) -> (..., d_out)."""

    def delta_weight(self, adapter: str) -> Tensor:
        """What `adapter` adds to the base weight: (d_out, d_in), fp32 or wider. Only for methods that merge."""
        raise UserError(f"adapter {adapter!r} is not linear in its input and has no weight to merge")

    # --- what they share -----------------------------------------------------------------------------------------------

    def add_adapter(self, adapter: str, config: Any) -> None:
        """Add one adapter with its own config; its tensors stay fp32 whatever the dtype of the base is.

        Raises:
            UserError: the rank is above min(d_in, d_out).
        """
        limit = min(self.in_features, self.out_features)
        if config.r > limit:
            raise UserError(
                f"rank r={config.r} is above min(d_in, d_out)={limit} of module {self.name!r} "
                f"({self.out_features} x {self.in_features}): write r <= {limit} or leave this module out"
            )
        self.configs[adapter] = config
        self.create_parameters(adapter, config)
        device = self.weight.device
        for name in self.adapter_layer_names:
            parameters = getattr(self, name)
            # meta: PEFT's low_cpu_mem_usage, or a model of which only the shapes are wanted
            if device.type != "meta" and not parameters[adapter].is_meta:
                parameters[adapter].data = parameters[adapter].data.to(device)
        self.set_adapter(self.active_adapters or [adapter], inference_mode=config.inference_mode)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x: (..., d_in) -> (..., d_out), in the base layer's output dtype."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        output = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return output
        for adapter in self.active_adapters:
            if adapter in self.configs:
                output = output + self.adapter_output(adapter, x).to(output.dtype)
        return output

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the adapters' weights to the base weight: summed in fp32, rounded once to the base's own dtype.

        Args:
            safe_merge: refuse, and leave the base as it was, where the sum has NaN or infinite entries.
            adapter_names: which adapters; the active ones by default.

        Raises:
            UserError: the method or the base layer cannot merge.
            ValueError: with `safe_merge`, entries that are not finite.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.configs]
        if not names:
            return
        backend = self.quantization_backend
        if backend is not None and not backend.supports_merge:
            raise UserError(
                f"module {self.name!r} is quantised with {backend.backend_name}, which cannot take an update"
            )
        base_layer = self.get_base_layer()
        if is_reordered_4bit(base_layer):
            raise UserError(
                f"module {self.name!r} was evaluated on the CPU before the adapter was added, and bitsandbytes then stores its "
                "4-bit weight in another order: load the base model again, add the adapter, then merge"
            )
        restore = snapshot(base_layer)
        weight = self.get_base_weight()
        total = weight.to(at_least_fp32(weight.dtype))
        for adapter in names:
            delta = self.delta_weight(adapter)
            total = total + (delta.T if is_transposed(base_layer) else delta)
        if safe_merge and not torch.isfinite(total).all():
            raise ValueError(
                f"merging {names} into module {self.name!r} gives NaN or infinite weights; nothing was merged"
            )
        self.set_base_weight(total.to(weight.dtype))
        self.merged_adapters.extend(names)
        self._restore_base = self._restore_base or restore

    def unmerge(self) -> None:
        """Bring the base weight back as it was before the first merge, bit for bit (also when it is quantised)."""
        if self.merged:
            self._restore_base()
            self._restore_base = None
            self.merged_adapters.clear()

    def extra_repr(self) -> str:
        methods = {name: config.peft_type.value.lower() for name, config in self.configs.items()}
        return f"d_in={self.in_features}, d_out={self.out_features}, adapters={methods}"
