"""FSDP2: what is frozen lies in shares (torch's `fully_shard`); what trains stays whole in fp32, under DistributedDataParallel.

Asked for by an Accelerate configuration. Accelerate's own FSDP would share adapters too, in units with the base: every logged
line, save and checkpoint would need a gather, and under bf16 it casts all of a unit, adapters included, to bf16 before it
computes. Here only layers of the base are units, so what looks at adapters works as with DistributedDataParallel.
"""

from __future__ import annotations

import os

from accelerate import Accelerator
from peft import PeftModel
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from curvelora.errors import UserError
from curvelora_training.config import Recipe

NAME = "FSDP2"
_ASKED = "CURVELORA_FSDP2"  # in the environment, so that it is forgotten with it


def fsdp_asked() -> bool:
    """Whether an Accelerate configuration asks for FSDP.

    Raises:
        UserError: it asks for the first version, or to offload, neither of which is there.
    """
    if _ASKED not in os.environ and os.environ.get("ACCELERATE_USE_FSDP", "").lower() != "true":
        return False
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise UserError("this Accelerate configuration asks for FSDP 1: take ds_configs/accelerate_fsdp2.yaml")
    if os.environ.get("FSDP_OFFLOAD_PARAMS", "false").lower() == "true":
        raise UserError("offloading with FSDP2 is not there: take ds_configs/zero3_offload_params.json")
    return True


def take_over() -> None:
    """Keep Accelerate's FSDP away: the base is shared by `share_base`, and the model wrapped by `data_parallel`."""
    os.environ[_ASKED] = "1"
    os.environ["ACCELERATE_USE_FSDP"] = "false"


def why_not(recipe: Recipe) -> list[str]:
    """What FSDP2 cannot do of this recipe, in sentences."""
    problems = []
    if recipe.training.deepspeed is not None:
        problems.append(
            "training.deepspeed and an Accelerate configuration with FSDP exclude each other: leave one out"
        )
    if recipe.model.quantization != "none":
        problems.append(
            f"model.quantization {recipe.model.quantization} stores bytes with scales beside them, which FSDP2 cannot share: "
            "take zero3.json, or plain DistributedDataParallel"
        )
    if recipe.method.name == "full":
        problems.append("adapter.method full leaves nothing frozen for FSDP2 to share: take zero2.json or zero3.json")
    if recipe.training.gradient_checkpointing:
        problems.append(
            "training.gradient_checkpointing has not been tried with FSDP2: leave it out, or take zero3.json"
        )
    return problems


def share_base(model: PeftModel) -> None:
    """Keep a share of every frozen parameter of the base's layers and embeddings; each is gathered while its module runs.

    What trains is left alone. A few small parameters that lie elsewhere (norms at the end, positions) and embeddings that are
    tied, which several modules use at different times, stay whole; `share_of_base` counts them.

    Raises:
        UserError: transformers does not say which modules are the model's layers.
    """
    base = model.get_base_model()
    names = set(getattr(base, "_no_split_modules", None) or ())
    ends = {base.get_input_embeddings(), base.get_output_embeddings()} - {None}
    layers = [m for m in base.modules() if type(m).__name__ in names and not ends & {*m.modules()}]
    if not layers:
        raise UserError(f"{type(base).__name__} does not say which of its modules are layers: take zero3.json")
    trained = {p for p in model.parameters() if p.requires_grad}
    for unit in [*layers, *(m for m in ends if _is_its_own(m, base))]:
        if any(not p.requires_grad for p in unit.parameters()):
            fully_shard(unit, reshard_after_forward=True, ignored_params=trained)
    # DistributedDataParallel would send them to all processes and wait for their gradients
    hidden = [name for name, p in model.named_parameters() if is_shared(p)]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, hidden)


def data_parallel(model: PeftModel, accelerator: Accelerator) -> DistributedDataParallel:
    """Wrap a model with shares in it as Accelerate wraps others; on GPUs it refuses one, as shares would not be kept in step.

    Args:
        model: from `share_base`; its shares are frozen, and hidden from DistributedDataParallel.
        accelerator: gives autocast and the settings.
    """
    model = accelerator.prepare_model(model, device_placement=False, evaluation_mode=True)
    settings = accelerator.ddp_handler.to_kwargs() if accelerator.ddp_handler is not None else {}
    return DistributedDataParallel(model, **settings)


def is_shared(parameter: nn.Parameter) -> bool:
    """Whether this process holds a share of it."""
    return isinstance(parameter, DTensor)


def _is_its_own(module: nn.Module, base: nn.Module) -> bool:
    """Whether no other module has its weight."""
    weight = getattr(module, "weight", None)
    return weight is not None and sum(getattr(m, "weight", None) is weight for m in base.modules()) == 1
