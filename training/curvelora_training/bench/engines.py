"""What a training step costs under the engines: DeepSpeed's ZeRO-1, 2 and 3 on as many GPUs as there are, on drawn bases.

The engines are set up as training sets them up (ZeRO-3: the frozen base in shares of blocks). One process group makes all of
them, one after the other, arm by arm, so their ratios come from one run. Wall time of whole steps, device synchronised, on the
first process; peaks of all processes. Throughput on one process less is what efficiency is taken from, in a run of its own.
"""

from __future__ import annotations

import gc
import resource
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from transformers import PretrainedConfig

from curvelora_eval.environment import describe_environment
from curvelora_training.bench.adapted import arm_model, set_update_std, switch
from curvelora_training.bench.arms import Arm
from curvelora_training.bench.devices import Device
from curvelora_training.bench.random_base import random_model
from curvelora_training.distributed import deepspeed_of, rank, world_size
from curvelora_training.zero3 import for_what_trains, share_held

WARM_UP = 3  # steps; DeepSpeed and the allocator settle in them


def measure_engines(
    config: PretrainedConfig,
    base: str,
    arms: list[Arm],
    stage: int,
    options: dict[str, Any],
    rows: int,
    length: int,
    steps: int,
    device: Device,
    say: Callable[[str], None] = print,
    kept: int = 0,
) -> Iterator[dict[str, Any]]:
    """One record an arm, each when it is there; every process has to go through all of them.

    Args:
        options: of the adapters, of which each arm takes those that its method has.
        rows, length: of a batch on each process, of random tokens.
        steps: timed steps, after `WARM_UP`.
        kept: layers that keep their large products (`kept_products`), of arms that do not say it themselves; the others make all
            again in the backward pass.

    Raises:
        UserError: Liger's kernels cannot be had, or take weights that are in shares.
    """
    device.reset_peak()
    started = time.perf_counter()
    model = random_model(config, base, device.device, shared=stage == 3)
    device.synchronise()
    ready, building = time.perf_counter() - started, device.peak()
    for arm in arms:
        adapted = arm_model(model, arm, options, [], 0, True)
        record = {
            "model": config.name,
            "base": base,
            "arm": arm.key,
            "stage": stage,
            "share_of_base": share_held(adapted),
            "base_seconds": ready,
            "base_peak_bytes": _most(building[0] if building else None),
            **_steps(adapted, replace(arm, keep=arm.keep or kept), stage, rows, length, steps, device),
        }
        say(
            f"{arm.key}, {base}, ZeRO-{stage}: {record['step_seconds']['median']:.3f} s a step, "
            f"{record['tokens_per_second_per_process']:,.0f} tokens/s on each of {world_size()}"
        )
        yield record
        del adapted
        _forget()
    del model
    _forget()


def _steps(
    model: torch.nn.Module, arm: Arm, stage: int, rows: int, length: int, steps: int, device: Device
) -> dict[str, Any]:
    import deepspeed

    inner = model.get_base_model()
    inner.gradient_checkpointing_enable({"use_reentrant": False})
    computed = switch(model, arm)
    inner.enable_input_require_grads()
    model.train()
    std = set_update_std(model, 1e-2)
    resident = torch.cuda.memory_allocated() if device.is_gpu else None
    settings = deepspeed_of(stage, "bfloat16") | {
        "train_micro_batch_size_per_gpu": rows,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 1.0,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }
    settings = for_what_trains(settings) if stage == 3 else settings
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)[0]
    draw = torch.Generator().manual_seed(rank())
    vocabulary = inner.config.vocab_size
    device.reset_peak()
    seconds, losses = [], []
    for _ in range(WARM_UP + steps):
        tokens = torch.randint(0, vocabulary, (rows, length), generator=draw).to(device.device)
        device.synchronise()
        started = time.perf_counter()
        loss = engine(input_ids=tokens, labels=tokens).loss
        engine.backward(loss)
        engine.step()
        device.synchronise()
        seconds.append(time.perf_counter() - started)
        losses.append(loss.item())
    peak = device.peak()
    engine.destroy()
    timed = seconds[WARM_UP:]
    median = statistics.median(timed)
    return {
        "processes": world_size(),
        "rows": rows,
        "length": length,
        "layers_keeping_products": computed.pop("kept_layers"),
        **computed,
        "trainable_parameters": sum(p.numel() for p in trained),
        "update_std": std,
        "step_seconds": {"median": median, "all": timed},
        "tokens_per_second_per_process": rows * length / median,
        "losses": losses,
        "resident_bytes": resident,
        "peak_bytes": {"allocated": _most(peak[0]), "reserved": _most(peak[1])} if peak else None,
        "host_peak_bytes": _most(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024),
        "device": device.name,
        "clocks": device.clocks(),
        "environment": describe_environment(),
    }


def _most(value: int | None) -> int | None:
    """The largest over all processes."""
    if value is None or not dist.is_initialized():
        return value
    found: list[int] = [0] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return max(found)


def _forget() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
