"""What every adapter layer of this project shares: parameters per adapter, switching, merging.

A family subclasses `AdapterLayer` and says three things: which tensors an adapter has (`create_parameters`), what it adds to
the output (`adapter_output`), and, where it merges, what it adds to the weight (`delta_weight`).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge, onload_layer
from peft.utils.quantization_utils import resolve_quantization_backend
from torch import Tensor, nn

from curvelora.errors import UserError
from curvelora.layers.base_weight import (
    device_of_weight,
    is_transposed,
    linear_shape,
    refuse_reordered_4bit,
    snapshot,
)
from curvelora.merging import Merge, approximate_is_allowed
from curvelora.precision import at_least_fp32


class AdapterLayer(nn.Module, BaseTunerLayer):
    """A frozen linear layer with any number of adapters on it.

    The base layer is called, never rewritten, so whatever PEFT can wrap serves as a base: fp32, bf16, NF4, int8.

    Args:
        base_layer: the layer to adapt; d_in inputs, d_out outputs.
        name: its name in the model.
    """

    adapter_layer_names: tuple[str, ...] = ()
    other_param_names: tuple[str, ...] = ("configs",)

    def __init__(self, base_layer: nn.Module, name: str) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.name = name
        self.in_merged_form = False  # see `curvelora.merging.merged_form`
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
    def create_parameters(self, adapter: str, config: Any, model: nn.Module | None) -> None:
        """Create and initialise the tensors of `adapter` (fp32, on any device; they are moved afterwards).

        `model` is the base model, which knows its checkpoint: for an init that starts from the unquantised weight.
        """

    @abstractmethod
    def adapter_output(self, adapter: str, x: Tensor) -> Tensor:
        """What `adapter` adds to the base layer's output. x: (..., d_in) -> (..., d_out)."""

    @abstractmethod
    def delta_weight(self, adapter: str) -> Tensor:
        """What merging `adapter` adds to the base weight: (d_out, d_in), fp32 or wider."""

    # --- what they share -----------------------------------------------------------------------------------------------

    def add_adapter(self, adapter: str, config: Any, model: nn.Module | None = None) -> None:
        """Add one adapter with its own config; its tensors stay fp32 whatever the dtype of the base is.

        Raises:
            UserError: the rank is above min(d_in, d_out), or the init has no weight to start from.
        """
        limit = min(self.in_features, self.out_features)
        if config.r > limit:
            raise UserError(
                f"rank r={config.r} is above min(d_in, d_out)={limit} of module {self.name!r} "
                f"({self.out_features} x {self.in_features}): write r <= {limit} or leave this module out"
            )
        for name in (*self.adapter_layer_names, *self.other_param_names):
            if adapter in (own := getattr(self, name)):  # one that had this name may have had other tensors
                del own[adapter]
        self.create_parameters(adapter, config, model)
        self.configs[adapter] = config
        self._move_adapter_to_device_of_base_layer(adapter)
        self.set_adapter(self.active_adapters or [adapter], inference_mode=config.inference_mode)

    def tensors(self, adapter: str) -> Iterator[Tensor]:
        """The tensors of `adapter`, trainable and frozen."""
        for name in (*self.adapter_layer_names, *self.other_param_names):
            if name != "configs" and adapter in getattr(self, name):
                yield getattr(self, name)[adapter]

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """PEFT's own casts to the base's dtype too, which would round what must stay fp32."""
        device = device or device_of_weight(self.get_base_layer())
        for tensor in self.tensors(adapter_name):
            # meta: PEFT's low_cpu_mem_usage, or a base of which only the shapes are wanted
            if "meta" not in (tensor.device.type, device.type):
                tensor.data = tensor.data.to(device)

    def forward(self, x: Tensor, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Tensor:
        """x: (..., d_in) -> (..., d_out), in the base layer's output dtype; see `mixed_batch` for `adapter_names`."""
        if self.disable_adapters and self.merged:
            with onload_layer(self):
                self.unmerge()
        output = self.base_layer(x, *args, **kwargs)
        if adapter_names is not None and not self.disable_adapters:
            return self.mixed_output(x, output, adapter_names)
        if self.disable_adapters or self.merged:
            return output
        for adapter in self.active_adapters:
            if adapter in self.configs:
                output = output + self.adapter_output(adapter, x).to(output.dtype)
        return output

    def mixed_output(self, x: Tensor, output: Tensor, names: list[str]) -> Tensor:
        """`output` (rows, ..., d_out) with each row's own adapter added; x: (rows, ..., d_in).

        Raises:
            UserError: not one name a row, or adapters that are merged.
        """
        if len(names) != len(x):
            raise UserError(f"adapter_names has {len(names)} names for a batch of {len(x)} rows: give one name a row")
        if self.merged:
            raise UserError("adapter_names needs adapters that are not merged: call model.unmerge_adapter() first")
        output = output.clone()
        for name in dict.fromkeys(names):
            if name in self.configs:  # else another layer has it, or it is the base
                rows = [i for i, own in enumerate(names) if own == name]
                output[rows] += self.adapter_output(name, x[rows]).to(output.dtype)
        return output

    def check_takes_update(self) -> None:
        """Raise `UserError` where the base weight cannot be written."""
        backend = self.quantization_backend
        if backend is not None and not backend.supports_merge:
            raise UserError(
                f"module {self.name!r} is quantised with {backend.backend_name}, which cannot take an update: keep the adapter, "
                "or merge it into the unquantised base"
            )
        refuse_reordered_4bit(self.get_base_layer(), self.name)

    def check_merge(self, adapters: list[str]) -> None:
        """Raise `UserError` where one of `adapters` cannot be merged, or only approximately and nobody has allowed that."""
        for adapter in adapters:
            config = self.configs[adapter]
            if config.merge is Merge.IMPOSSIBLE:
                raise UserError(
                    f"adapter {adapter!r} cannot be merged: {config.why_not_exact}, so no change of the weight equals it; "
                    "keep it as an adapter"
                )
            if config.merge is Merge.APPROXIMATE and not approximate_is_allowed():
                raise UserError(
                    f"adapter {adapter!r} merges only approximately: {config.why_not_exact}; measure the gap with "
                    "curvelora.output_change.merge_gap and merge inside `with curvelora.merging.allow_approximate():`, or use "
                    "`curvelora merge --approximate`"
                )

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the adapters' weights to the base weight: summed in fp32, rounded once to the base's own dtype.

        Args:
            safe_merge: refuse, and leave this layer as it was, where the sum has NaN or infinite entries.
            adapter_names: which adapters; the active ones by default.

        Raises:
            UserError: the method or the base layer cannot merge.
            ValueError: with `safe_merge`, entries that are not finite.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.configs]
        if not names:
            return
        self.check_merge(names)
        self.check_takes_update()
        base_layer = self.get_base_layer()
        restore = snapshot(base_layer)
        weight = self.get_base_weight()
        total = weight.to(at_least_fp32(weight.dtype))
        for adapter in names:
            delta = self.delta_weight(adapter)
            total = total + (delta.T if is_transposed(base_layer) else delta)
        total = total.to(weight.dtype)
        if safe_merge and not torch.isfinite(total).all():
            raise ValueError(
                f"merging {names} into module {self.name!r} gives NaN or infinite weights, so it was left as it was"
            )
        self.set_base_weight(total)
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
