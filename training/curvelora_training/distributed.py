"""Which engine a launcher asked for, and the set-up that DeepSpeed needs where there is no GPU.

The engine is decided by, in this order: `training.deepspeed` in the recipe; an Accelerate configuration with DeepSpeed; the
`deepspeed` launcher itself, which without any configuration means ZeRO-2 here. What is really in use is read back from the
trainer (`engine_in_use`) and written to result.json; an engine that was asked for and is not in use is an error.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from transformers import Trainer

from curvelora.errors import UserError

# What the `deepspeed` launcher means when nothing else is said; "auto" takes the trainer's values.
ZERO_2: dict[str, Any] = {
    "zero_optimization": {"stage": 2},
    "bf16": {"enabled": "auto"},
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
}


def rank() -> int:
    """Rank of this process; 0 without a launcher."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Number of processes; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def deepspeed_settings(recipe_file: str | None) -> str | dict[str, Any] | None:
    """What to hand to `TrainingArguments.deepspeed`; None where another engine runs or Accelerate configures DeepSpeed."""
    if recipe_file is not None:
        return recipe_file
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true":
        return None
    # set by deepspeed's launcher for its children, and by no other
    if "CROSS_RANK" in os.environ and "LOCAL_SIZE" in os.environ:
        return dict(ZERO_2)
    return None


def wants_deepspeed(recipe_file: str | None) -> bool:
    """Whether the launcher or the recipe asked for DeepSpeed."""
    return (
        deepspeed_settings(recipe_file) is not None or os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true"
    )


def trainer_arguments(recipe_file: str | None) -> dict[str, Any]:
    """Arguments for `TrainingArguments` that set the engine up, for this launcher on this machine."""
    on_cpu = not torch.cuda.is_available()
    arguments: dict[str, Any] = {"use_cpu": on_cpu, "ddp_find_unused_parameters": False}
    if not wants_deepspeed(recipe_file):
        return arguments
    if "RANK" not in os.environ:
        raise UserError(
            "DeepSpeed needs a launcher, also for one process: start with `torchrun --nproc-per-node 1 -m "
            "curvelora_training.finetune ...`, `accelerate launch` or `deepspeed`"
        )
    arguments["deepspeed"] = deepspeed_settings(recipe_file)
    if on_cpu:
        arguments["accelerator_config"] = {"use_configured_state": True}
        _deepspeed_on_cpu()
    return arguments


def _deepspeed_on_cpu() -> None:
    """Bring the process group up with gloo and tell Accelerate about it.

    Accelerate picks gloo only with cpu=True and takes its DeepSpeed branches only with cpu=False, so on a machine without GPU
    neither way works alone (accelerate 1.15, deepspeed 0.19). The group is therefore made first, the state is built with
    cpu=True, and then told that DeepSpeed runs.
    """
    import deepspeed
    import deepspeed.ops
    from accelerate import PartialState
    from accelerate.utils import DistributedType

    # Otherwise DeepSpeed compiles a shared-memory op at the first gloo init: a minute, and an error without ninja.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False)
    state = PartialState(cpu=True)
    state.distributed_type = DistributedType.DEEPSPEED
    state.__dict__["_cpu"] = False


def engine_in_use(trainer: Trainer) -> dict[str, Any]:
    """What wraps the model after `train()`: engine class, ZeRO stage, number of processes, device."""
    wrapped = trainer.model_wrapped
    stage = wrapped.zero_optimization_stage() if hasattr(wrapped, "zero_optimization_stage") else None
    return {
        "engine": type(wrapped).__name__ if world_size() > 1 or stage is not None else "single process",
        "zero_stage": stage,
        "processes": trainer.args.world_size,
        "device": trainer.args.device.type,
    }


def check_engine(engine: dict[str, Any], recipe_file: str | None) -> None:
    """Raise `UserError` where DeepSpeed or several processes were asked for and are not in use."""
    if wants_deepspeed(recipe_file) and engine["zero_stage"] is None:
        raise UserError(
            f"DeepSpeed was asked for but {engine['engine']} ran: with `accelerate launch`, do not combine --cpu with DeepSpeed; "
            "use ds_configs/accelerate_zero2.yaml"
        )
    if engine["processes"] != world_size():
        raise UserError(
            f"the launcher started {world_size()} processes but the trainer sees {engine['processes']}: see docs/launching.md"
        )


def leave() -> None:
    """Take the process group down, so that no launcher warns of a leak."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
