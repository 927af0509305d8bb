"""ZeRO-3: the frozen base is held in shares over the processes, and gathered when it is needed.

There are two ways. What trains beside a frozen base (adapters, new heads) is DeepSpeed's ZeRO-2, and the base is in
`frozen_shares`, gathered block by block. Where a part of the base trains, PEFT reads its weights while it adds the adapter, or
its shares are to lie in host memory, DeepSpeed's own ZeRO-3 is taken, which gathers module by module and costs two to three times
the step. Adapters are a hundredth of the base and whole on every process either way (their moments are sharded, and with
DeepSpeed's their gradients): they can be saved, measured and logged as with any other engine.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainingArguments
from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config

from curvelora.checkpoint import stored_tensor_shapes
from curvelora.errors import UserError
from curvelora.layers.weight_product import reads_weight
from curvelora_eval.spec import ModelSpec
from curvelora_training.config import Recipe
from curvelora_training.frozen_shares import units_of
from curvelora_training.fsdp import is_shared

# Part of the base trains, or PEFT reads its weights.
BY_MODULES = ("full", "bitfit", "dora", "pissa_rewritten_base")
# Entries a bucket. DeepSpeed's default of 5e8 takes 2 GB of device memory, for adapters that are a hundredth of it.
BUCKETS = {"reduce_bucket_size": 50_000_000, "allgather_bucket_size": 50_000_000}
THRESHOLD = "stage3_param_persistence_threshold"


def stage_of(settings: dict[str, Any] | None) -> int | None:
    """The ZeRO stage that a DeepSpeed configuration asks for; None without one."""
    return None if settings is None else settings["zero_optimization"]["stage"]


def by_blocks(recipe: Recipe, settings: dict[str, Any] | None, processes: int, base: PreTrainedModel) -> bool:
    """Whether this run's base is held in `frozen_shares`, and not by DeepSpeed.

    Args:
        settings: DeepSpeed's, or None.
        base: the model or its shapes.
    """
    return (
        stage_of(settings) == 3
        and processes > 1
        and recipe.method.name not in BY_MODULES
        and not _reads_weights(recipe)
        and recipe.adapter_options().get("bias", "none") == "none"
        and not settings["zero_optimization"].get("offload_param")
        and bool(units_of(base, set()))
    )


def _reads_weights(recipe: Recipe) -> bool:
    """Whether PEFT's LoRA is told to start from the weights, or to be DoRA."""
    options = recipe.adapter_options()
    start = options.get("init_lora_weights", True)
    return bool(options.get("use_dora")) or start not in (True, False, "gaussian", "orthogonal")


def for_what_trains(settings: dict[str, Any]) -> dict[str, Any]:
    """DeepSpeed's settings beside a base in `frozen_shares`: ZeRO-2, without what concerns parameters in shares."""
    section = {key: value for key, value in settings["zero_optimization"].items() if not _of_shares(key)}
    return settings | {"zero_optimization": BUCKETS | section | {"stage": 2}}


def idle_keys(settings: dict[str, Any]) -> list[str]:
    """The keys that `for_what_trains` leaves out, but for our own default."""
    section = settings["zero_optimization"].items()
    return [key for key, value in section if _of_shares(key) and (key, value) != (THRESHOLD, 0)]


def _of_shares(key: str) -> bool:
    return key.startswith("stage3_") or key in ("sub_group_size", "module_granularity_threshold")


def why_not(recipe: Recipe) -> list[str]:
    """What ZeRO-3 cannot do of this recipe, in sentences."""
    method, model, problems = recipe.method.name, recipe.model, []
    if method == "delora":
        problems.append(
            "adapter.method delora needs the norms of the weights, which PEFT takes of ZeRO-3's placeholders: take ZeRO-2 or "
            "another method"
        )
    if recipe.training.max_steps == 0:
        problems.append(
            "training.max_steps=0 trains nothing, and ZeRO-3 cannot run without training: leave DeepSpeed out"
        )
    if (method == "dora" or recipe.adapter_options().get("use_dora")) and model.quantization == "nf4":
        problems.append(
            "adapter.method dora on a base in nf4 has PEFT make another weight of the one that ZeRO-3 keeps in shares, which "
            "it does not know then: take ZeRO-2, or an unquantised base"
        )
    if model.quantization == "int8":
        problems.append(
            "model.quantization int8 keeps its codes where ZeRO-3 does not look, so every process would hold all of them: take "
            "nf4, or ZeRO-2"
        )
    if model.dtype != "float32" and (method == "full" or recipe.adapter_options().get("bias", "none") != "none"):
        problems.append(
            f"what trains has to be float32, and ZeRO-3 loads the base, of which a part trains here, in {model.dtype}: set "
            "model.dtype=float32, or take ZeRO-2"
        )
    return problems


def check_by_modules(recipe: Recipe, shapes: PreTrainedModel, new_head: bool) -> None:
    """What DeepSpeed's own way of gathering cannot do.

    Raises:
        UserError: the checkpoint has a head of other classes, which transformers replaces, but not under ZeRO-3; or products are
            to be kept, while DeepSpeed gathers inside of layers, and otherwise in each pass.
    """
    if recipe.training.keep_products:
        raise UserError(
            "training.keep_products does not work where DeepSpeed gathers the base module by module (ZeRO-3 on one process, with "
            "parameters offloaded, or where a part of the base trains or is read): leave it out, or take ZeRO-2"
        )
    if not new_head:
        return
    own = {name: tuple(tensor.shape) for name, tensor in shapes.state_dict().items()}
    for name, shape in stored_tensor_shapes(recipe.model.path, recipe.model.revision).items():
        if own.get(name, shape) != shape:
            raise UserError(
                f"{recipe.model.path} has {name} in the shape {shape}, {own[name]} is needed, and under ZeRO-3 transformers "
                "cannot replace it: take ZeRO-2, or a checkpoint without that head"
            )


@contextlib.contextmanager
def loading_into_shares(arguments: TrainingArguments, spec: ModelSpec) -> Iterator[None]:
    """Inside, transformers loads the base into shares of its dtype; one that is quantised while loading comes whole.

    DeepSpeed takes the dtype from the configuration's half-precision section, which this project leaves out (it would store the
    adapters in it, too), and would make a bf16 base fp32. So the section is there while weights are loaded. With a quantised base
    transformers must not know of ZeRO-3: it refuses the device that bitsandbytes needs, and the engine takes the shares later.
    """
    if spec.quantization != "none":
        unset_hf_deepspeed_config()
        try:
            yield
        finally:
            set_hf_deepspeed_config(arguments.hf_deepspeed_config)
        return
    config = arguments.hf_deepspeed_config.config
    config["bf16"] = {"enabled": spec.dtype == "bfloat16"}
    try:
        with drawn_on_cpu():
            yield
    finally:
        del config["bf16"]


@contextlib.contextmanager
def drawn_on_cpu() -> Iterator[None]:
    """Inside, random numbers come from the CPU's generator, on whichever device they are wanted.

    DeepSpeed makes a new head on the GPU; other engines make it on the CPU, and the same seed is to give the same head.
    """

    def on_cpu(draw: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def drawn(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if tensor.device.type == "cpu":
                return draw(tensor, *args, **kwargs)
            return tensor.copy_(draw(torch.empty_like(tensor, device="cpu"), *args, **kwargs))

        return drawn

    with contextlib.ExitStack() as patches:  # no TorchFunctionMode: torch.nn.init's functions would leave it
        for name in ("normal_", "uniform_"):
            patches.enter_context(mock.patch.object(Tensor, name, on_cpu(getattr(Tensor, name))))
        yield


def announce_parameters(model: nn.Module) -> None:
    """Tell DeepSpeed which parameters an adapter layer uses beside those of its submodules.

    That is what lies in a `ParameterDict`, which is no module that runs, and the weight under an adapter that reads it. It would
    find them by itself, but in the middle of the first pass with the adapter on, when it has recorded another order already.
    """
    from deepspeed.runtime.zero.partition_parameters import register_external_parameter

    for layer in model.modules():
        if isinstance(layer, BaseTunerLayer):
            held = [p for child in layer.children() if isinstance(child, nn.ParameterDict) for p in child.values()]
            if reads_weight(layer):
                held.append(layer.get_base_layer().weight)
            for parameter in held:
                register_external_parameter(layer, parameter)


def keep_adapters_whole(engine: nn.Module) -> None:
    """Have every trainable parameter gathered again after each update, and stay.

    By name and not by size, as DeepSpeed's own threshold has it, which would keep base weights that are no larger.

    Args:
        engine: DeepSpeed's, of stage 3.
    """
    kept = engine.optimizer.persistent_parameters
    for parameter in engine.module.parameters():
        if parameter.requires_grad and not parameter.ds_persist:
            parameter.ds_persist = True
            kept.append(parameter)


def gather_kept(engine: nn.Module) -> None:
    """Gather again what stays whole, after an update that DeepSpeed left out: it leaves all parameters in shares then.

    Args:
        engine: DeepSpeed's, of any stage.
    """
    if kept := getattr(engine.optimizer, "persistent_parameters", None):
        kept[0].all_gather(kept)


def share_held(model: nn.Module) -> float:
    """The part of the base that this process holds beside what is gathered for a pass: 1 without ZeRO-3 and FSDP2."""
    # all of it trains in full fine-tuning
    frozen = [p for p in model.parameters() if not p.requires_grad] or list(model.parameters())
    total = sum(map(_entries, frozen))
    return sum(map(_held, frozen)) / total


def _held(parameter: nn.Parameter) -> float:
    if is_shared(parameter):
        return parameter.to_local().numel()
    if hasattr(parameter, "share_numel"):
        return parameter.share_numel
    shared = hasattr(parameter, "ds_tensor") and not parameter.ds_persist
    return parameter.ds_tensor.numel() if shared else _entries(parameter)


def _entries(parameter: nn.Parameter) -> int:
    return getattr(parameter, "ds_numel", parameter.numel())
