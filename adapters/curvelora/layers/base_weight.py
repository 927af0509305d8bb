"""The frozen weight under an adapter: its shape, and a snapshot that brings it back bit for bit."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain
from typing import Any

import torch
from peft.utils.integrations import dequantize_bnb_weight, gather_params_ctx
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from curvelora.errors import UserError


def is_transposed(base_layer: nn.Module) -> bool:
    """True where the weight is stored as (d_in, d_out), as GPT-2's `Conv1D` does."""
    return isinstance(base_layer, Conv1D)


def linear_shape(base_layer: nn.Module, name: str) -> tuple[int, int]:
    """Return (d_in, d_out) of a linear layer: `nn.Linear`, `Conv1D`, or a quantised layer that names its features.

    Raises:
        UserError: the layer is not linear; `name` says which one it is.
    """
    if is_transposed(base_layer):
        # ZeRO-3 leaves a placeholder of size 0 and keeps the true shape in ds_shape.
        return tuple(getattr(base_layer.weight, "ds_shape", base_layer.weight.shape))
    d_in, d_out = getattr(base_layer, "in_features", None), getattr(base_layer, "out_features", None)
    # embeddings and convolutions have weights but no features; bilinear layers have in1_features
    if d_in is None or d_out is None:
        raise UserError(
            f"module {name!r} is of type {type(base_layer).__name__}, and this method is defined for linear layers only: "
            "leave it out of target_modules"
        )
    return d_in, d_out


def device_of_weight(base_layer: nn.Module) -> torch.device:
    """Where a linear layer multiplies; its weight may have another name (GPTQ qweight, HQQ W_q), or be offloaded."""
    if (hook := offloading_hook(base_layer)) is not None:
        return torch.device(hook.execution_device)
    named = (getattr(base_layer, name, None) for name in ("qweight", "W_q", "weight"))
    tensors = chain((t for t in named if t is not None), base_layer.parameters(), base_layer.buffers())
    return next(tensors).device


def offloading_hook(base_layer: nn.Module) -> Any | None:
    """Accelerate's hook that brings the weight for each pass; None where the weight is here."""
    hook = getattr(base_layer, "_hf_hook", None)
    several = getattr(hook, "hooks", [hook])  # where one was added to another
    return next((h for h in several if getattr(h, "offload", False) and getattr(h, "weights_map", None) is not None), None)


def is_partitioned(tensor: Tensor) -> bool:
    """Whether the processes hold this parameter in shares: DeepSpeed leaves a placeholder of size 0; or it has `whole`.

    `whole` is set by who shares a frozen weight otherwise: `whole()` is a context in which it is all there.
    """
    return hasattr(tensor, "whole") or (tensor.numel() == 0 and getattr(tensor, "ds_numel", 0) > 0)


@contextlib.contextmanager
def whole_weight(base_layer: nn.Module) -> Iterator[Tensor]:
    """The weight as it is stored, for reading inside the `with` block.

    One in shares is gathered from all processes and given back afterwards, so every process has to come here.

    Raises:
        UserError: it is partitioned, and transformers does not know of it.
    """
    weight = base_layer.weight
    if not is_partitioned(weight):
        yield weight
        return
    if hasattr(weight, "whole"):
        with weight.whole():
            yield weight
        return
    with gather_params_ctx(weight, modifier_rank=None):
        if is_partitioned(weight):
            raise UserError(
                "the weights are partitioned by ZeRO-3, which transformers was not told: make a HfDeepSpeedConfig and keep it "
                "before the model is loaded"
            )
        yield weight


def requantised(base_layer: nn.Module, weight: Tensor) -> Tensor | None:
    """What the quantiser of a bitsandbytes layer makes of `weight` (d_out, d_in), dequantised; None for other quantisers."""
    own = getattr(base_layer, "weight", None)
    if type(own).__name__ == "Params4bit":
        state = own.quant_state
        # its parameters quantise themselves when they are put on a device
        again = type(own)(
            weight.to(state.dtype),
            requires_grad=False,
            blocksize=state.blocksize,
            quant_type=state.quant_type,
            compress_statistics=state.nested,
        ).to(own.device)
        return dequantize_bnb_weight(again, state=again.quant_state)
    if type(own).__name__ == "Int8Params":
        again = type(own)(weight.half().cpu(), requires_grad=False).to(own.device)
        return again.CB.float() * again.SCB[:, None] / 127
    return None


def keep_4bit_layout(model: nn.Module) -> None:
    """Stop bitsandbytes (0.50) from reordering 4-bit codes when a layer is first evaluated on a CPU with AVX512-BF16.

    A reordered layer has no backward pass (what flows through it is dropped, with a warning only) and dequantises to garbage,
    so training after an evaluation, and merging, would silently go wrong. The price is that faster evaluation kernel.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def refuse_reordered_4bit(base_layer: nn.Module, name: str) -> None:
    """Raise `UserError` where that has happened already: the layer was evaluated before `keep_4bit_layout`."""
    state = getattr(getattr(base_layer, "weight", None), "quant_state", None)
    if getattr(state, "packing_format_for_cpu", False):
        raise UserError(
            f"module {name!r} was evaluated on the CPU before the adapter was added, and bitsandbytes then stores its 4-bit "
            "weight in another order, which cannot be read back: load the base model again and add the adapter first"
        )


def snapshot(base_layer: nn.Module) -> Callable[[], None]:
    """Remember the weight of `base_layer` as it is now; calling the result puts it back, bit for bit.

    Adding and then subtracting an update does not restore a floating-point weight, and a quantised one far less (each
    requantisation moves it again). Holding the old tensor costs its memory only while the adapter is merged.
    """
    weight = base_layer.weight
    state = getattr(base_layer, "state", None)  # bitsandbytes int8 keeps its codes and scales here after the first call
    state_attributes = dict(vars(state)) if state is not None else {}
    # a partial and no closure: a copied or pickled layer must restore its own weight
    return partial(_restore, base_layer, weight, weight.data, dict(vars(weight)), state_attributes)


def _restore(
    base_layer: nn.Module,
    weight: nn.Parameter,
    data: Tensor,
    attributes: dict[str, Any],
    state_attributes: dict[str, Any],
) -> None:
    current = base_layer.weight
    vars(weight).update({name: _on(current.device, value) for name, value in attributes.items()})
    if state_attributes:
        vars(base_layer.state).update({name: _on(current.device, value) for name, value in state_attributes.items()})
    if vars(base_layer).get("_parameters", {}).get("weight") is not weight:  # a quantiser replaced the parameter
        base_layer.weight = weight
    # the model may have been moved or cast while it was merged; packed weights are integers, which are never cast
    cast = data.is_floating_point() and current.is_floating_point()
    weight.data = data.to(current.device, current.dtype if cast else data.dtype)


def _on(device: torch.device, value: Any) -> Any:
    """`value` on `device`, where it is a tensor or the scales of a 4-bit weight, which move in place."""
    if isinstance(value, Tensor):
        return value.to(device)
    if type(value).__name__ == "QuantState":
        value.to(device)
    return value
