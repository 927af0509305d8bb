"""Which engine a launcher asked for, and the set-up that DeepSpeed needs where there is no GPU.

The engine is decided by, in this order: `training.deepspeed` in the recipe; an Accelerate configuration with DeepSpeed, or with
FSDP 2 (`fsdp`); the `deepspeed` launcher itself, which without any configuration means ZeRO-2 here. What is really in use is read
back from the trainer (`engine_in_use`) and written to result.json; an engine that was asked for and is not in use is an error.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import Trainer

from curvelora.errors import UserError, nearest
from curvelora.kernels import fp8_record, fused_layers
from curvelora_training import fsdp
from curvelora_training.config import TrainingSpec
from curvelora_training.zero3 import BUCKETS, THRESHOLD, share_held, stage_of

JOB_HAS_GPUS = "CURVELORA_JOB_HAS_GPUS"  # set while `curvelora launch` checks a recipe

T = TypeVar("T")
# How long processes wait for one that writes: a full model on a slow disk takes longer than a collective's usual ten minutes, and
# one that has died is the launcher's business, which ends the others.
PATIENCE = timedelta(days=1)
LOADING = timedelta(hours=2)  # that the fastest process waits for the slowest to load the base

# What DeepSpeed means where no file says more; "auto" takes the trainer's values.
AUTO = {
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
}
FROM_THE_RECIPE = (*AUTO, "train_batch_size")
# Other sections that a file may have.
HEEDED = (
    "zero_optimization",
    "bf16",
    "fp16",
    "zero_force_ds_cpu_optimizer",
    "zero_allow_untested_optimizer",
    "steps_per_print",
)
HEEDED += (
    "wall_clock_breakdown",
    "memory_breakdown",
    "communication_data_type",
    "prescale_gradients",
    "dump_state",
    "aio",
)
HEEDED += ("gradient_predivide_factor", "comms_logger", "flops_profiler", "comms_config", "data_types")
DEFAULT_STAGE = 2


def rank() -> int:
    """Rank of this process; 0 without a launcher."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Number of processes; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def gpus_elsewhere() -> bool:
    """Whether a recipe is checked for a job whose nodes have GPUs, perhaps on a machine without one."""
    return bool(os.environ.get(JOB_HAS_GPUS))


def accelerate_asks_for_deepspeed() -> bool:
    """Whether `accelerate launch` was configured for DeepSpeed."""
    return os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true"


def deepspeed_settings(recipe_file: str | None, dtype: str) -> dict[str, Any] | None:
    """The DeepSpeed configuration of this run, or None where another engine runs.

    The half-precision sections of a file are left out: DeepSpeed's bf16 engine would store adapters in bf16, and BA needs
    fp32 factors. Autocast takes its place, with gradients exchanged in fp32.

    Args:
        recipe_file: `training.deepspeed`.
        dtype: the recipe's `model.dtype`.
    """
    stage = DEFAULT_STAGE
    if recipe_file is None and accelerate_asks_for_deepspeed():
        recipe_file = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE")
        offload = [
            os.environ.get(f"ACCELERATE_DEEPSPEED_OFFLOAD_{part}_DEVICE", "none") for part in ("OPTIMIZER", "PARAM")
        ]
        if recipe_file is None and offload != ["none", "none"]:
            raise UserError(
                "offloading is set in Accelerate's own keys, which are not read here: name a deepspeed_config_file"
            )
        stage = int(os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE") or DEFAULT_STAGE)
    elif recipe_file is None and not ("CROSS_RANK" in os.environ and "LOCAL_SIZE" in os.environ):
        return None  # those two are set by deepspeed's launcher for its children, and by no other
    return deepspeed_of(stage, dtype, read_deepspeed_file(recipe_file) if recipe_file is not None else {})


def deepspeed_of(stage: int, dtype: str, settings: dict[str, Any] | None = None) -> dict[str, Any]:
    """DeepSpeed's settings at this stage as training has them, with those of a file in their place where it has some."""
    settings = dict(AUTO) | {"zero_optimization": {"stage": stage, **BUCKETS}} | (settings or {})
    for section in ("bf16", "fp16"):
        settings.pop(section, None)
    if stage_of(settings) == 3:  # nothing of the base stays whole unless a file says so
        settings["zero_optimization"] = {THRESHOLD: 0} | settings["zero_optimization"]
    if dtype != "float32":
        settings["torch_autocast"] = {"enabled": True, "dtype": dtype, "lower_precision_safe_modules": []}
    return settings


def read_deepspeed_file(path: str) -> dict[str, Any]:
    """Read a DeepSpeed JSON.

    Raises:
        UserError: it cannot be read, shards nothing, asks for half-precision weights, or has a key that would not be heeded.
    """
    name = f"the DeepSpeed configuration {path}"
    try:
        settings = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{name} cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise UserError(f"{name} is no valid JSON ({error})") from error
    if not isinstance(settings, dict) or "zero_optimization" not in settings:
        raise UserError(f"{name} has no zero_optimization section, so it would shard nothing")
    zero = settings["zero_optimization"]
    stage = zero.get("stage") if isinstance(zero, dict) else None
    if stage not in (0, 1, 2, 3) or isinstance(stage, bool):
        raise UserError(f"{name} has ZeRO stage {stage!r}: write 0, 1, 2 or 3")
    for section in ("bf16", "fp16"):
        value = settings.get(section)
        if (value.get("enabled") if isinstance(value, dict) else value) is True:
            raise UserError(
                f"{name} enables {section}, which would store the adapter in it, and BA needs "
                f"float32 factors: leave the section out, the recipe's model.dtype decides"
            )
    for key, value in settings.items():
        if key in FROM_THE_RECIPE:
            if value != "auto":
                raise UserError(f'{name} sets {key}, which the recipe decides: write "auto", or leave it out')
        elif key in ("optimizer", "scheduler"):
            raise UserError(f"{name} has its own {key}, which would replace the recipe's: leave it out")
        elif key not in HEEDED:
            raise UserError(
                f"{name} has a key {key!r} that DeepSpeed would not heed{nearest(key, HEEDED)}: leave it out"
            )
    _check_zero_section(name, zero)
    return settings


def _check_zero_section(name: str, zero: dict[str, Any]) -> None:
    """Raise `UserError` where DeepSpeed would not take the section, which it says only when the model is loaded."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from pydantic import ValidationError

    try:
        DeepSpeedZeroConfig(**{key: value for key, value in zero.items() if value != "auto"})
    except ValidationError as error:
        found = error.errors()[0]
        where = ".".join(map(str, found["loc"]))
        raise UserError(f"{name}: zero_optimization.{where}: {found['msg']}") from error
    if (zero.get("offload_optimizer") or {}).get("device") == "nvme":
        raise UserError(f'{name} offloads the optimiser to "nvme", where checkpoints do not reach: write "cpu"')


def trainer_arguments(spec: TrainingSpec, dtype: str) -> dict[str, Any]:
    """Arguments for `TrainingArguments` that set the engine and the precision up, for this launcher on this machine."""
    on_cpu = not torch.cuda.is_available()
    arguments: dict[str, Any] = {"use_cpu": on_cpu, "ddp_find_unused_parameters": False}
    settings = deepspeed_settings(spec.deepspeed, dtype)
    if settings is None and fsdp.fsdp_asked():
        if world_size() == 1:
            raise UserError("FSDP2 shares the base between processes, and there is one: leave FSDP out, or start more")
        fsdp.take_over()
    # `accelerate launch` sets this from its own configuration, and the trainer would follow it: the recipe decides.
    precision = {"bfloat16": "bf16", "float16": "fp16"}.get(dtype, "no") if settings is None else "no"
    os.environ["ACCELERATE_MIXED_PRECISION"] = precision
    timeout = timedelta(minutes=spec.timeout_minutes)
    if settings is None:
        if on_cpu and world_size() > 1 and not torch.distributed.is_initialized():
            torch.distributed.init_process_group("gloo", timeout=timeout)  # transformers keeps its timeout for GPUs
        return arguments | {"bf16": dtype == "bfloat16", "fp16": dtype == "float16"}
    if "RANK" not in os.environ:
        raise UserError(
            "DeepSpeed needs a launcher, also for one process: start with `torchrun --nproc-per-node 1 -m "
            "curvelora_training.finetune ...`, `accelerate launch` or `deepspeed`"
        )
    if dtype == "float16":
        raise UserError("DeepSpeed runs with model.dtype bfloat16 or float32 here: float16 would need loss scaling")
    arguments["deepspeed"] = settings
    if on_cpu:
        arguments["accelerator_config"] = {"use_configured_state": True}
        _deepspeed_on_cpu(timeout)
    return arguments


def _deepspeed_on_cpu(timeout: timedelta) -> None:
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
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False, timeout=timeout)
    state = PartialState(cpu=True)
    state.distributed_type = DistributedType.DEEPSPEED
    state.__dict__["_cpu"] = False


def engine_in_use(trainer: Trainer) -> dict[str, Any]:
    """What wraps the model after `train()`: engine, ZeRO stage, processes, device, dtypes, share of the base, fused layers."""
    wrapped = trainer.model_wrapped
    stage = wrapped.zero_optimization_stage() if hasattr(wrapped, "zero_optimization_stage") else None
    gathered_by = "modules" if stage == 3 else None
    if any(hasattr(parameter, "share_numel") for parameter in trainer.model.parameters()):
        stage, gathered_by = 3, "blocks"  # DeepSpeed's share of it is stage 2
    dtypes = {True: set(), False: set()}
    for parameter in trainer.model.parameters():
        dtypes[parameter.requires_grad].add(str(parameter.dtype).removeprefix("torch."))
    name = type(wrapped).__name__ if world_size() > 1 or stage is not None else "single process"
    if any(map(fsdp.is_shared, trainer.model.parameters())):
        name = fsdp.NAME
    fused, reasons = fused_layers(trainer.model)
    return {
        "engine": name,
        "zero_stage": stage,
        "processes": trainer.args.world_size,
        "device": trainer.args.device.type,
        "trainable_dtype": ", ".join(sorted(dtypes[True])),
        "frozen_dtype": ", ".join(sorted(dtypes[False])),
        "share_of_base": share_held(trainer.model),
        "base_gathered_by": gathered_by,
        "fused_layers": fused,
        "unfused_layers": dict(reasons),
        **fp8_record(trainer.model),
    }


def check_engine(engine: dict[str, Any], asked: dict[str, Any]) -> None:
    """Raise `UserError` where something else ran than was asked for.

    Args:
        engine: from `engine_in_use`.
        asked: from `trainer_arguments`.
    """
    if "deepspeed" in asked and engine["zero_stage"] is None:
        raise UserError(
            f"DeepSpeed was asked for but {engine['engine']} ran: with `accelerate launch`, do not combine --cpu with "
            "DeepSpeed; use ds_configs/accelerate_zero2.yaml"
        )
    if (engine["engine"] == fsdp.NAME) is not (fully := fsdp.fsdp_asked()):
        raise UserError(f"{fsdp.NAME if fully else 'no FSDP'} was asked for and {engine['engine']} ran")
    if engine["zero_stage"] != (stage := stage_of(asked.get("deepspeed"))):
        raise UserError(f"ZeRO stage {stage} was asked for and stage {engine['zero_stage']} ran")
    if engine["processes"] != world_size():
        raise UserError(
            f"the launcher started {world_size()} processes but the trainer sees {engine['processes']}: see docs/launching.md"
        )
    # by blocks: weights beside them stay whole, and what modules_to_save leaves of them
    if engine["base_gathered_by"] == "modules" and engine["share_of_base"] > (most := 1.1 / engine["processes"]):
        raise UserError(
            f"ZeRO-3 left {engine['share_of_base']:.0%} of the base on this process, and {most:.0%} is the most"
        )
    if engine["trainable_dtype"] != "float32":
        raise UserError(f"the engine stored what trains in {engine['trainable_dtype']}, and it must be float32")


def agree(error: UserError | None) -> None:
    """Raise on every process what one of them found, so that none waits for another that has given up."""
    if why := next(filter(None, everyones(str(error) if error else None)), None):
        raise UserError(why) from error


def everyones(value: T) -> list[T]:
    """The values of all processes, in order of rank; every process must call it, and waits for the last as long as it takes."""
    values = [value] * world_size()
    if world_size() > 1:
        torch.distributed.all_gather_object(values, value, group=_patient_group())
    return values


def found_by_the_first(find: Callable[[], T]) -> T:
    """What `find()` gives on the first process, on every process; its error too, as a `UserError`."""
    found, problem = None, None
    if rank() == 0:
        try:
            found = find()
        except UserError as error:
            problem = error
        except (OSError, RuntimeError) as error:
            problem = UserError(f"{type(error).__name__}: {' '.join(str(error).split())}")
    agree(problem)
    return everyones(found)[0]


def all_loaded() -> None:
    """Wait until every process has its base: a slow disk is no process that hangs, so `training.timeout_minutes` is for later.

    Raises:
        UserError: some have none after `LOADING`; the first process names them.
    """
    if world_size() > 1:
        try:
            torch.distributed.monitored_barrier(_patient_group(), timeout=LOADING, wait_all_ranks=True)
        except RuntimeError as error:
            why = " ".join(str(error).split())[:300]
            raise UserError(
                f"not every process has loaded the base after {LOADING}: look at those of ({why})"
            ) from error


_patient: dict[Any, Any] = {}  # the process group -> its patient one, once it is there


def _patient_group() -> Any:
    """All processes over gloo, with a time-out of its own: those that wait for a file hold no GPU collective open."""
    world = torch.distributed.group.WORLD
    if world not in _patient:
        _patient.clear()
        _patient[world] = torch.distributed.new_group(backend="gloo", timeout=PATIENCE)
    return _patient[world]


def leave() -> None:
    """Take the process group down, so that no launcher warns of a leak."""
    _patient.clear()
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
