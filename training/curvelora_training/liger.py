"""liger-kernel's kernels on one model: RMSNorm, SwiGLU, RoPE, and cross entropy fused with the output layer.

liger-kernel (Hsu et al., 2024, https://github.com/linkedin/Liger-Kernel) has a function for each architecture that binds new
forward passes to a model that is there already, but it also writes into transformers' module, and RoPE nowhere else, so every
other model of the process would get that too. Here the module is left as it was: attention layers of this model run the same code
with Liger's RoPE among its globals.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from curvelora.errors import UserError
from curvelora_training.distributed import gpus_elsewhere

SILU = ("silu", "swish")


def check_liger(model: PreTrainedModel) -> None:
    """Raise `UserError` where Liger's kernels cannot be had, or would compute something else. Weights are not needed.

    Args:
        model: with or without its adapter, also on the meta device.
    """
    if importlib.util.find_spec("liger_kernel") is None:
        raise UserError("liger-kernel is not installed: pip install liger-kernel")
    if not (torch.cuda.is_available() or gpus_elsewhere()):
        raise UserError("liger-kernel is written in Triton, which needs a GPU: leave it out here")
    try:
        known = _liger().MODEL_TYPE_TO_APPLY_LIGER_FN
    except ImportError as error:
        raise UserError(f"liger-kernel cannot be imported ({' '.join(str(error).split())[:200]})") from error
    if model.config.model_type not in known:
        raise UserError(f"liger-kernel has nothing for models of type {model.config.model_type}: leave it out")
    head = model.get_output_embeddings()
    # it takes the weight and never calls the layer: an adapter on it would be passed over
    if _has_language_head(model) and (type(head) is not nn.Linear or head.bias is not None):
        raise UserError(
            "liger-kernel's loss takes the output layer's weight alone, and here the layer has more (an adapter, a copy that "
            "trains, a bias, or quantisation): leave one of the two out"
        )


def use_liger(model: PreTrainedModel, keeps_products: bool = False) -> None:
    """Put Liger's kernels on this model, and on no other. The loss is fused while the model trains; there are no logits then.

    Args:
        model: the model itself, not PEFT's around it; its linear layers may have adapters.
        keeps_products: some layers keep their products under gradient checkpointing. RoPE is transformers' then: Liger's rotates
            queries and keys in place, and a kept one would be rotated again in the second forward pass.

    Raises:
        UserError: as `check_liger`.
    """
    check_liger(model)
    silu = getattr(model.config, "hidden_act", SILU[0]) in SILU
    wanted: dict[str, Any] = {"cross_entropy": False}  # which would be torch's own function, for everyone
    wanted |= {"rope": False} if keeps_products else {}
    wanted |= {} if silu else {"swiglu": False}
    wanted |= {} if _has_language_head(model) else {"fused_linear_cross_entropy": False}
    theirs = vars(sys.modules[type(model).__module__])
    before = dict(theirs)
    try:
        _liger()._apply_liger_kernel_to_instance(model=model, **wanted)
    finally:
        new = {name: value for name, value in theirs.items() if before.get(name) is not value}
        for name in new:
            if name in before:
                theirs[name] = before[name]
            else:
                del theirs[name]
    twin = functools.cache(lambda function: _with_globals(function, new))
    for module in model.modules():
        forward = type(module).forward
        if "forward" not in vars(module) and new.keys() & set(_names(forward)):
            module.forward = MethodType(twin(forward), module)


def _liger() -> Any:
    """The module of liger-kernel that patches; it imports Triton, so only when it is asked for."""
    from liger_kernel.transformers import monkey_patch

    return monkey_patch


def _has_language_head(model: PreTrainedModel) -> bool:
    return type(model).__name__.endswith(("ForCausalLM", "ForConditionalGeneration"))


def _names(function: Any) -> tuple[str, ...]:
    """The global names that a function uses; none of what was not written in Python."""
    return function.__code__.co_names if isinstance(function, FunctionType) else ()


def _with_globals(function: FunctionType, new: dict[str, Any]) -> FunctionType:
    """The same code, to which these names mean something else."""
    given = function.__globals__ | new, function.__name__, function.__defaults__, function.__closure__
    twin = FunctionType(function.__code__, *given)
    twin.__kwdefaults__ = function.__kwdefaults__
    return twin
