"""The processes that `accelerate launch`, `torchrun` or `deepspeed` started, for plain data parallelism."""

from __future__ import annotations

import os
from datetime import timedelta

import torch

from curvelora.errors import UserError
from curvelora_training.distributed import accelerate_asks_for_deepspeed, rank, world_size
from curvelora_training.fsdp import fsdp_asked


def join() -> torch.device:
    """Join the process group, where a launcher started one, and return this process's device.

    Raises:
        UserError: Accelerate was configured for DeepSpeed or FSDP, which would not be used here.
    """
    asked = "DeepSpeed" if accelerate_asks_for_deepspeed() else "FSDP" if fsdp_asked() else None
    if asked:
        raise UserError(
            f"this Accelerate configuration asks for {asked}, and a comparison shares one frozen base between its arms in plain "
            "data parallelism: take ds_configs/accelerate_ddp.yaml, or torchrun; the `deepspeed` launcher works too"
        )
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    if world_size() > 1 and not torch.distributed.is_initialized():
        # the others wait while the first process looks at what was trained, which takes hours for the largest models
        torch.distributed.init_process_group("nccl" if on_gpu else "gloo", timeout=timedelta(hours=12))
    return device


def join_deepspeed() -> torch.device:
    """As `join`, through DeepSpeed, also for one process.

    Raises:
        UserError: no launcher started it.
    """
    if "RANK" not in os.environ:
        raise UserError(
            "the engines need a launcher: torchrun --standalone --nproc-per-node N -m curvelora_training.bench engines"
        )
    import deepspeed
    import deepspeed.ops

    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # or it would be compiled
    deepspeed.init_distributed("nccl" if on_gpu else "gloo", auto_mpi_discovery=False)
    return device


def say(text: str) -> None:
    """Print on the first process only."""
    if rank() == 0:
        print(text, flush=True)


def barrier() -> None:
    """Wait for all processes."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
