"""A training step as a CUDA graph: recorded once, then replayed without the host's work.

A small model on a large GPU spends its time in Python. Recorded, a step costs what the GPU needs. What is recorded is the same
code, kernel by kernel, so results are those of the plain step; only batches of one shape can be replayed, so this serves causal
language models in batches of fixed length. Arms with FP8, which is decided anew in each step, are not recorded.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch.nn import functional as F
from transformers import PreTrainedConfig

from curvelora.output_change import IGNORED
from curvelora_training.bench.arms import Arm
from curvelora_training.bench.ground import Ground
from curvelora_training.bench.sources import Batch
from curvelora_training.bench.trial import Trial

WARM_UP = 3  # steps on a side stream before recording, as PyTorch asks: libraries set themselves up in them


def record_step(trial: Trial, example: Batch, observe: bool) -> None:
    """Let `trial` replay its step from now on. Its parameters, moments and random numbers are as they were.

    Args:
        trial: on a GPU, before its first step.
        example: a batch of the shape that all batches have.
        observe: as in `Trial.step`; fixed for all replays.

    Raises:
        RuntimeError: something in the step cannot be recorded.
    """
    device = trial.device.device
    inputs = {key: value.to(device).clone() for key, value in example.items()}
    start = [p.detach().clone() for p in trial.named.values()]
    with torch.random.fork_rng([device]), _without_mask(trial.model.config):
        side = torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                trial.compute(inputs, lambda name: None, observe)
        torch.cuda.current_stream(device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = trial.compute(inputs, lambda name: None, observe)
    with torch.no_grad():
        for parameter, value in zip(trial.named.values(), start, strict=True):
            parameter.copy_(value)
        for state in trial.optimizer.state.values():
            for value in state.values():
                value.zero_()

    def replay(batch: Batch) -> dict[str, Any]:
        for key, value in inputs.items():
            value.copy_(batch[key])
        graph.replay()
        return _copied(outputs)

    trial.graph = replay


@contextlib.contextmanager
def _without_mask(config: PreTrainedConfig) -> Iterator[None]:
    """While it records, transformers cannot look whether sequences are packed, and would build a mask that the plain step does
    not have. With a cache, empty here, it does not look.
    """
    config.use_cache, before = True, config.use_cache
    try:
        yield
    finally:
        config.use_cache = before


def _copied(outputs: dict[str, Any]) -> dict[str, Any]:
    """The next replay overwrites what this one gave."""
    return {k: _copied(v) if isinstance(v, dict) else v.clone() for k, v in outputs.items()}


def start_trial(ground: Ground, arm: Arm, seed: int) -> tuple[Trial, Callable[[Batch], Batch]]:
    """A new trial, its step recorded unless that was not wanted or cannot be done, and how its batches must be prepared."""
    trial, settings = ground.trial(arm, seed), ground.settings
    alone = ground.device.is_gpu and not torch.distributed.is_initialized()
    if not settings.recorded or not alone or arm.fp8 or settings.checkpointing or "CausalLM" not in type(ground.base).__name__:
        return trial, lambda batch: batch
    prepare = partial(of_fixed_length, length=settings.length, pad_id=ground.base.config.pad_token_id or 0)
    try:
        record_step(trial, prepare(ground.source.batch(seed, 0)), observe=True)
    except RuntimeError as error:
        print(f"{arm.key}: the step cannot be recorded as a CUDA graph, so it runs as usual ({error})", flush=True)
        return ground.trial(arm, seed), lambda batch: batch
    return trial, prepare


def of_fixed_length(batch: Batch, length: int, pad_id: int) -> Batch:
    """A right-padded batch of a causal language model, padded to `length`, without its mask.

    No token attends to what comes after it, and labels leave padding out, so the loss is the same.
    """
    missing = length - batch["input_ids"].shape[1]
    return {
        "input_ids": F.pad(batch["input_ids"], (0, missing), value=pad_id),
        "labels": F.pad(batch["labels"], (0, missing), value=IGNORED),
    }
