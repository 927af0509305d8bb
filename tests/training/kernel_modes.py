"""A training step of a small Llama, with fused kernels and without, under an engine; as a program, many of them in one launch.

    torchrun --standalone --nproc-per-node 2 tests/training/kernel_modes.py OUT.json ddp:merged zero3:qlora

The step is SGD's, so what the factors move by is their gradient: AdamW's first step would be its sign alone.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig

from curvelora.kernels import dropout, factor_gradients, merged_linear, nf4, separate_linear, use_kernels
from curvelora_training.bench.adapted import arm_model, set_update_std
from curvelora_training.bench.arms import parse_arms
from curvelora_training.bench.processes import join_deepspeed
from curvelora_training.bench.random_base import random_model
from curvelora_training.distributed import deepspeed_of, leave, rank
from curvelora_training.kept_products import keep_products
from curvelora_training.zero3 import for_what_trains

# name -> base, arm, dropout and its form; with an amplitude at which Sinter's part of the gradients is as large as the rest, but
# in FP8, which is for small ones
ARMS = {
    "merged": ("nf4", "loran:sinter-large", {}),
    "features": ("nf4", "loran:sinter-large", {"dropout": 0.1, "dropout_form": "features"}),
    "exact": ("nf4", "loran:sinter-large", {"dropout": 0.1, "dropout_form": "exact"}),
    "dense": ("bf16", "loran:sinter-large", {}),
    "qlora": ("nf4", "qlora", {}),
    "thin": ("bf16", "qlora", {}),
    "dropped": ("nf4", "qlora", {"dropout": 0.1}),
    "fp8": ("nf4", "loran:sinter@fp8", {}),
}
COUNTED = {"dropped": "decoded", "thin": "thin"}  # what an arm without merged weights makes in their place
SINGLE = ("plain", "nonreentrant", "reentrant", "kept", "offloaded", "autocast", "compiled")
ENGINES = ("ddp", "ddp_unused", "ddp_accumulated", "zero1", "zero2", "zero3", "zero3_checkpointed")
# three blocks, so that two of them share a buffer under ZeRO-3; a CPU, where kernels are interpreted, has two layers in each
SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "vocab_size": 96}
LARGER = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 4, "vocab_size": 512}
FEW = ("q_proj", "down_proj")
ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
RATE = 1.0
KEEPING = 2  # blocks, of mode kept


def cell(arm: str, mode: str, device: torch.device) -> dict[str, Any]:
    """One step of the arm with kernels and one without.

    Returns:
        losses: of each batch before the step, and of the last one after it; without kernels, then with them.
        apart: how far apart the updates of A and of B are, relative to their size without kernels.
        calls: how often a kernel made a weight (or a thin product stood in for one), of each, and how often it should have, with
            kernels.
        fused, unfused: how many layers have kernels, and why the others have not.
        fp8: how many products were made in FP8, and how many should have been.
    """
    base, name, options = ARMS[arm]
    on_gpu = device.type == "cuda"
    config = LlamaConfig(num_attention_heads=2, num_key_value_heads=1, **(LARGER if on_gpu else SMALL))
    model = random_model(config, base, device, shared=mode.startswith("zero3"))
    options = {
        "r": 16 if on_gpu else 4,
        "alpha": 16,
        "dropout": 0.0,
        "target_modules": list(ALL if on_gpu else FEW),
        **options,
    }
    found = {}
    switched = "fp8" if arm == "fp8" else "auto"
    for kernels in ("off", switched):
        adapted = arm_model(model, parse_arms(name)[0], options, [], 0, True)
        set_update_std(adapted, 1e-2)
        fused, reasons = use_kernels(adapted, kernels)
        with (
            counted(COUNTED.get(arm, "merged_weight")) as calls,
            same_masks(),
            counted_fp8() as products,
        ):
            losses, moved = step(adapted, mode, device)
        found[kernels] = losses, moved, calls[0], fused, reasons
    (before, wanted, none, *_), (after, given, calls, fused, reasons) = found["off"], found[switched]
    apart = {key: ((given[key] - wanted[key]).norm() / wanted[key].norm()).item() for key in wanted}
    calls = [none, calls, wanted_calls(mode, fused, config.num_hidden_layers)]
    passes = 2 if mode == "ddp_accumulated" else 1
    products = [products[0], fused * passes if arm == "fp8" and mode != "compiled" else 0]
    found = {"losses": [before, after], "apart": apart, "calls": calls, "fp8": products}
    return found | {"fused": fused, "unfused": dict(reasons)}


def wanted_calls(mode: str, layers: int, blocks: int) -> int:
    """Each layer makes its weight in both passes of a step and in the pass after it, and in a pass that is made again.

    That one ends before the product of the block's last layer, or needs none where a block keeps its products.
    """
    in_time = layers - blocks
    again = {"reentrant": layers, "nonreentrant": in_time, "zero3_checkpointed": in_time}
    again["kept"] = in_time * (blocks - KEEPING) // blocks
    return (5 if mode == "ddp_accumulated" else 3) * layers + again.get(mode, 0)


@contextlib.contextmanager
def counted(kernel: str = "merged_weight") -> Iterator[list[int]]:
    """Inside, a list of one number: how many weights a kernel has made. On a CPU in tiles no larger than these layers.

    Args:
        kernel: or, where a layer makes no other, "decoded"; where it makes none, "thin", for the products in place of one.
    """
    calls, merge = [0], merged_linear.merged_weight

    def merging(A: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        return merge(A, *args, **options) if A.is_cuda else merge(A, *args, tile=(64, 64, 1, 4, 1), **options)

    def count(function: Callable[..., Any], name: str) -> Callable[..., Any]:
        def counting(*args: Any, **options: Any) -> Any:
            calls[0] += kernel == name
            return function(*args, **options)

        return counting

    with (
        mock.patch.object(merged_linear, "merged_weight", count(merging, "merged_weight")),
        mock.patch.object(separate_linear, "merged_weight", count(merging, "merged_weight")),
        mock.patch.object(nf4, "decoded", count(nf4.decoded, "decoded")),
        mock.patch.object(separate_linear, "scaled_product", count(separate_linear.scaled_product, "thin")),
        mock.patch.object(separate_linear, "thin_back", count(separate_linear.thin_back, "thin")),
    ):
        yield calls


@contextlib.contextmanager
def counted_fp8() -> Iterator[list[int]]:
    """Inside, a list of one number: how many products have been made in FP8."""
    made, make = [0], factor_gradients.fp8_product

    def counting(*args: Any) -> torch.Tensor:
        made[0] += 1
        return make(*args)

    with mock.patch.object(factor_gradients, "fp8_product", counting):
        yield made


@contextlib.contextmanager
def same_masks() -> Iterator[None]:
    """Inside, layers without kernels drop of their input what kernels would drop, from the same seeds."""
    drop = nn.functional.dropout

    def dropped(x: torch.Tensor, p: float, training: bool = True, inplace: bool = False) -> torch.Tensor:
        if x.dim() == 1 or not training:  # of features: the same either way
            return drop(x, p, training)
        kept = dropout.mask_reference(x.shape, dropout.new_seed(x.device), p) > 0
        return (x.float() * kept / (1 - p)).to(x.dtype)

    with mock.patch.object(nn.functional, "dropout", dropped):
        yield


def step(model: nn.Module, mode: str, device: torch.device) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses before and after a step, and the movement of all A and of all B as one fp64 vector each, on the CPU."""
    inner = model.get_base_model()
    if mode in ("nonreentrant", "reentrant", "kept", "zero3_checkpointed"):
        inner.gradient_checkpointing_enable({"use_reentrant": mode == "reentrant"})
    if mode == "kept":
        assert keep_products(inner, KEEPING) == KEEPING
    inner.enable_input_require_grads()
    model.train()
    start = {name: p.detach().double().cpu() for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=RATE)
    draw = torch.Generator().manual_seed(rank())
    rows, length = (2, 256) if device.type == "cuda" else (2, 12)
    batches = [torch.randint(0, inner.config.vocab_size, (rows, length), generator=draw).to(device) for _ in range(2)]
    torch.manual_seed(rank())
    run = _run_zero if mode.startswith("zero") else _run
    losses = run(model, optimizer, batches[: 2 if mode == "ddp_accumulated" else 1], mode, device)
    moved: dict[str, list[torch.Tensor]] = {"A": [], "B": []}
    for name, parameter in model.named_parameters():
        if name in start:
            kind = "A" if "_A" in name else "B"
            moved[kind].append((parameter.detach().double().cpu() - start[name]).flatten())
    return losses, {kind: torch.cat(parts) for kind, parts in moved.items()}


def _run(
    model: nn.Module, optimizer: torch.optim.Optimizer, batches: list[torch.Tensor], mode: str, device: torch.device
) -> list[float]:
    if mode.startswith("ddp"):
        ids = [device.index] if device.type == "cuda" else None
        model = DistributedDataParallel(model, device_ids=ids, find_unused_parameters=mode == "ddp_unused")
    elif mode == "compiled":
        # Inductor's own random numbers would depend on the graph, and so would what is dropped
        on_gpu = {"backend": "inductor", "options": {"fallback_random": True}}
        model = torch.compile(model, **(on_gpu if device.type == "cuda" else {"backend": "aot_eager"}))
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=mode == "autocast")
    offloaded = torch.autograd.graph.save_on_cpu() if mode == "offloaded" else contextlib.nullcontext()
    losses = []
    for number, tokens in enumerate(batches):
        last = number == len(batches) - 1
        with model.no_sync() if mode.startswith("ddp") and not last else contextlib.nullcontext():
            with autocast, offloaded:
                loss = model(input_ids=tokens, labels=tokens).loss
            loss.backward()
        losses.append(loss.item())
    optimizer.step()
    with autocast:
        return [*losses, model(input_ids=batches[-1], labels=batches[-1]).loss.item()]


def _run_zero(
    model: nn.Module, optimizer: torch.optim.Optimizer, batches: list[torch.Tensor], mode: str, device: torch.device
) -> list[float]:
    import deepspeed

    stage = int(mode[4])
    settings = deepspeed_of(stage, "bfloat16") | {
        "train_micro_batch_size_per_gpu": len(batches[0]),
        "gradient_accumulation_steps": 1,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }
    settings = {k: v for k, v in (for_what_trains(settings) if stage == 3 else settings).items() if v != "auto"}
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)[0]
    (tokens,) = batches
    loss = engine(input_ids=tokens, labels=tokens).loss
    engine.backward(loss)
    engine.step()
    losses = [loss.item(), engine(input_ids=tokens, labels=tokens).loss.item()]
    engine.destroy()
    return losses


def main(out: str, *names: str) -> None:
    """Write {"MODE:ARM": its cell} from the first process."""
    device = join_deepspeed()
    found = {name: cell(name.partition(":")[2], name.partition(":")[0], device) for name in names}
    if rank() == 0:
        Path(out).write_text(json.dumps(found), encoding="utf-8")
    leave()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
