"""When a layer's pass takes the fused kernels; everywhere else it runs as it is written in `curvelora.layers`.

The environment's CURVELORA_KERNELS decides first: `auto` (the default), `off`, or `interpret`, which lets tensors on a CPU take
them in Triton's interpreter, far slower than anything, for tests.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from functools import cache
from weakref import WeakKeyDictionary, ref

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from curvelora.activations import Activation
from curvelora.errors import UserError, nearest
from curvelora.precision import compute_dtype

ENVIRONMENT = "CURVELORA_KERNELS"
_KNOWN: WeakKeyDictionary[nn.Module, tuple] = WeakKeyDictionary()
USES = ("auto", "off", "fp8")
MODES = ("auto", "off", "interpret")
MAX_RANK = 128  # a tile's rank is whole in registers
MAX_ENTRIES = 1 << 31  # offsets are 32-bit


def environment_mode() -> str:
    """The value of CURVELORA_KERNELS. Raises `UserError` where it is none of `MODES`."""
    value = os.environ.get(ENVIRONMENT, "auto").lower() or "auto"
    if value not in MODES:
        raise UserError(f"{ENVIRONMENT}={value!r} is not known{nearest(value, MODES)}: write {', '.join(MODES)}")
    return value


# torch.compile would trace into what is the same for the whole run, warn of the cache, and stop at the device's properties
@torch.compiler.assume_constant_result
def why_nowhere(device: torch.device) -> str | None:
    """Why no kernel runs in this process on `device`; None where they do."""
    mode = environment_mode()
    return why_no_triton(mode) or why_no_device(device, mode)


@cache
def why_no_triton(mode: str) -> str | None:
    """Why Triton cannot be used in this process; None where it can. `mode` is from `environment_mode`."""
    try:
        from curvelora.kernels import portable
    except ImportError:
        return "Triton is not installed"
    if mode == "interpret" and not portable.INTERPRETED:
        return "CURVELORA_KERNELS=interpret needs TRITON_INTERPRET=1 before Python starts"
    return None


@cache
def why_no_device(device: torch.device, mode: str) -> str | None:
    """Why kernels do not run on `device`; None where they do."""
    if device.type == "cpu":
        return None if mode == "interpret" else "on a CPU"
    if device.type != "cuda" or torch.version.hip:
        return f"on {device.type if device.type != 'cuda' else 'ROCm'}"
    major, minor = torch.cuda.get_device_capability(device)
    return None if major >= 8 else f"a GPU of capability {major}.{minor}, and 8.0 is needed for bf16"


def why_no_curve(f: object) -> str | None:
    """Why f, of a `DeltaMap`, has no kernel; None where it has one."""
    if not isinstance(f, Activation):
        return "f is learned or has a schedule"
    from curvelora.kernels import curves

    return None if f.name in curves.NAMES else f"activation {f.name} has no kernel"


def why_not(base_layer: nn.Module, rank: int) -> str | None:
    """Why a pass of this base layer with an update f(BA) of this rank takes no kernel, whatever f is; None where it does.

    It is asked in every pass, so what holds for a weight as it is stored is remembered.
    """
    # a fused pass does not call the layer
    if has_hooks(base_layer) or hasattr(base_layer, "_hf_hook"):
        return "the base layer has hooks, perhaps one that brings its weight"
    if "forward" in vars(base_layer):
        return "the base layer has a forward of its own"
    if rank > MAX_RANK:
        return f"rank {rank} is above {MAX_RANK}"
    weight, bias = getattr(base_layer, "weight", None), getattr(base_layer, "bias", None)
    if any(tensor is not None and tensor.requires_grad for tensor in (weight, bias)):
        return "the base trains"
    if torch.compiler.is_compiling():
        return _why_not_stored(base_layer, weight)
    # what moving, casting or sharing out the model changes; scales are compared by identity, their own == looks at every entry
    state = getattr(weight, "quant_state", None)
    now = (*(getattr(weight, name, None) for name in ("ds_id", "device", "dtype")), os.environ.get(ENVIRONMENT))
    known = _KNOWN.get(base_layer)
    if known is None or known[0]() is not weight or known[1]() is not state or known[2] != now:
        # not the weight itself: bitsandbytes's keeps its layer, which would then be kept here for ever
        known = _KNOWN[base_layer] = _weakly(weight), _weakly(state), now, _why_not_stored(base_layer, weight)
    return known[3]


def has_hooks(module: nn.Module) -> bool:
    """Whether calling `module` does more than its forward."""
    before = module._forward_pre_hooks or module._backward_pre_hooks
    return bool(before or module._forward_hooks or module._backward_hooks)


def _weakly(thing: object) -> Callable[[], object]:
    return ref(thing) if thing is not None else lambda: None


def _why_not_stored(base_layer: nn.Module, weight: Tensor | None) -> str | None:
    if environment_mode() == "off":
        return f"{ENVIRONMENT}=off"
    if not isinstance(weight, Tensor):
        return f"a {type(base_layer).__name__} has no weight that kernels read"
    if (reason := why_nowhere(weight.device)) is not None:
        return reason
    from curvelora.kernels import nf4

    if type(base_layer) is nn.Linear and type(weight) not in (Tensor, nn.Parameter):
        return f"the base's weight is a {type(weight).__name__}"  # which may keep its bytes elsewhere
    if type(base_layer) is not nn.Linear and (reason := nf4.why_unreadable(base_layer)) is not None:
        return reason
    if hasattr(weight, "ds_id"):  # also while it is gathered: it is given back between forward and backward pass
        return "the base is partitioned by DeepSpeed's ZeRO-3"
    d_out, d_in = base_layer.out_features, base_layer.in_features
    if d_out * d_in >= MAX_ENTRIES:
        return f"{d_out} x {d_in} entries, and 2^31 is the limit"
    if type(base_layer) is nn.Linear and weight.dtype != torch.bfloat16:
        return f"a base in {str(weight.dtype).removeprefix('torch.')}"
    return None


def takes_kernels(base_layer: nn.Module, x: Tensor, A: Tensor, B: Tensor) -> bool:
    """Whether a pass with this input does, apart from `why_not`: it multiplies in bf16, and the factors are fp32."""
    # a layer of bitsandbytes may have been told to multiply in another dtype, which holds where there is no autocast
    told = None if torch.is_autocast_enabled(x.device.type) else getattr(base_layer, "compute_dtype", None)
    in_bf16 = compute_dtype(x) == torch.bfloat16 and told in (None, torch.bfloat16)
    return in_bf16 and A.dtype == B.dtype == torch.float32 and x.numel() > 0


def use_kernels(model: nn.Module, mode: str = "auto") -> tuple[int, Counter[str]]:
    """Have the adapter layers of `model` take the fused kernels where they can ("auto"), or nowhere ("off").

    LoRAN's layers take them without being asked; PEFT's LoRA layers do after this call.

    Args:
        model: the module that training calls.
        mode: "auto", "off", or "fp8": as auto, and the part of the gradients beyond f'(0) is from products in FP8 where its error
            is bounded (`fp8_gate`; `fp8_gate.taken` tells how often).

    Returns:
        How many layers can, and for the others reason -> how many.

    Raises:
        UserError: an unknown mode, or a GPU without products in FP8.
    """
    if mode not in USES:
        raise UserError(f"kernels {mode!r} is not known{nearest(mode, USES)}: write {', '.join(USES)}")
    no_triton = why_no_triton(environment_mode())
    if mode == "fp8" and no_triton is not None:
        raise UserError(f"kernels fp8: {no_triton}: write auto")
    if no_triton is None:
        from curvelora.kernels import fp8_gate

        (fp8_gate.watch if mode == "fp8" else fp8_gate.unwatch)(model)
    from curvelora.kernels.peft_lora import is_lora_layer, switch
    from curvelora.layers.dense_delta import DenseDeltaLayer

    for layer in model.modules():
        if isinstance(layer, DenseDeltaLayer):
            layer.kernels = mode
        elif is_lora_layer(layer):
            switch(layer, mode)
    return fused_layers(model)


def fp8_record(model: nn.Module) -> dict[str, dict[str, int]]:
    """{"fp8": {asked, allowed, products}} as `fp8_gate.Taken` has them; {} where `use_kernels` was not told "fp8"."""
    if why_no_triton(environment_mode()) is not None:
        return {}
    from curvelora.kernels.fp8_gate import taken

    return {} if (found := taken(model)) is None else {"fp8": asdict(found)}


def fused_layers(model: nn.Module) -> tuple[int, Counter[str]]:
    """How many adapter layers of `model` can take kernels as they are now, and for the others reason -> how many."""
    from curvelora.kernels.peft_lora import is_lora_layer, why_not_fused
    from curvelora.layers.dense_delta import DenseDeltaLayer

    able, reasons = 0, Counter()
    for layer in model.modules():
        if isinstance(layer, DenseDeltaLayer):
            reason = layer.why_no_kernels()
        elif is_lora_layer(layer):
            reason = why_not_fused(layer)
        elif isinstance(layer, BaseTunerLayer):
            reason = f"{type(layer).__name__} has no kernels"
        else:
            continue
        if reason is None:
            able += 1
        else:
            reasons[reason] += 1
    return able, reasons
