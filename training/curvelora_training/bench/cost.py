"""What a step costs: time by phase, throughput, model FLOPs utilisation, memory, energy, and the overhead to the baseline.

Model FLOPs of a step, the same number for every arm, so that an arm's extra work lowers its utilisation instead of raising it:

    tokens * (4 N + 6 P) + 6 * layers * tokens * length * width

N counts the weights of all linear layers (output layer included, embeddings not), which are frozen: a forward pass and the
gradient of its input, 2 FLOPs each. P = sum r (d_in + d_out) is what a LoRA of this rank trains: 2 more for its own gradient.
The last term is attention with causal masking: QK^T and AV over half of the pairs are 2 * tokens * length * width forward and
twice that backward. Recomputation under activation checkpointing is not counted. MFU = model FLOPs of a process / step time /
peak.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import bitsandbytes as bnb
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from curvelora.errors import UserError
from curvelora.kernels import fp8_record
from curvelora.layers.base_weight import linear_shape
from curvelora_eval.environment import describe_environment
from curvelora_training.bench.adapted import set_update_std, update_std_of
from curvelora_training.bench.ground import Ground
from curvelora_training.bench.interleave import Rounds, Timings, interleave, overheads
from curvelora_training.bench.processes import barrier
from curvelora_training.bench.sources import Batch
from curvelora_training.bench.trial import PhaseClock, Trial
from curvelora_training.distributed import rank, world_size

FORMULA = "tokens * (4 N + 6 P) + 6 * layers * tokens * length * width; N: linear weights, P: r (d_in + d_out)"


class _StepTurn:
    """A trial as the harness runs it: on the device in its turn only, one fixed sequence of batches."""

    def __init__(self, name: str, trial: Trial, ground: Ground, seed: int) -> None:
        self.name, self.trial, self.ground, self.seed = name, trial, ground, seed
        self.clock = PhaseClock(ground.device)

    def enter(self) -> None:
        self.trial.unpark()
        barrier()

    def run(self) -> dict[str, float]:
        with fits(self.name):
            return self._run()

    def _run(self) -> dict[str, float]:
        self.clock.mark("start")
        batch = self.ground.source.batch(self.seed, self.trial.taken, rank(), world_size())
        self.trial.step(batch, self.clock)
        return self.clock.seconds()

    def leave(self) -> None:
        self.trial.park()


def measure_steps(
    ground: Ground, rounds: Rounds, update_std: float, say: Callable[[str], None] = print
) -> Iterator[dict[str, Any]]:
    """Whole training steps of every arm, interleaved: yields the record of cost.json, after each round anew.

    Args:
        update_std: standard deviation of the entries of BA at which every arm is measured; never 0.
    """
    settings, device = ground.settings, ground.device
    seed, trials, reached = settings.seeds[0], {}, {}
    in_fp32 = {arm.key for arm in settings.arms if arm.fp32 or settings.base == "fp32"}
    for arm in settings.arms:
        with fits(arm.key):
            trial = ground.trial(arm, seed, at_peak=True)
            reached[arm.key] = set_update_std(trial.model, update_std, seed)
        trial.park()
        trials[arm.key] = trial
        fused = trial.computed["fused_layers"]
        say(f"ready: {arm.key}, trains {trial.trainable_parameters:,} parameters, fused layers: {fused}")
    gemm = device.gemm_tflops(ground.base.config.dtype)
    tokens = ground.source.tokens or _mean_tokens(ground, seed, rounds)
    flops = model_flops(ground, tokens)
    turns = {key: _StepTurn(key, trial, ground, seed) for key, trial in trials.items()}
    for done, timings in enumerate(interleave(turns, rounds, device, say), start=1):
        ratios = overheads(timings, settings.baseline)
        yield {
            "schema": 1,
            "kind": "bench_step",
            "file": "cost.json",
            "settings": settings.as_dict(),
            "environment": describe_environment(),
            "device": device.name,
            "processes": world_size(),
            "base_ready_seconds": ground.seconds,
            "std_BA_target": update_std,
            "rounds": done,
            "steps_per_round": rounds.steps,
            "warmup_steps": rounds.warmup,
            "tokens_per_step": tokens,
            "model_flops_per_step": flops,
            "flops_formula": FORMULA,
            "peak_tflops": device.peak_tflops,
            "gemm_tflops": gemm,
            "clocks": device.clocks(),
            "arms": {
                key: {
                    "std_BA": reached[key],
                    "std_BA_at_the_end": update_std_of(trials[key].model) if done == rounds.rounds else None,
                    "trainable_parameters": trials[key].trainable_parameters,
                    **trials[key].computed,
                    **fp8_record(trials[key].model),
                    **_rates(found, tokens, flops, gemm, None if key in in_fp32 else device.peak_tflops),
                    "overhead": ratios[key],
                }
                for key, found in timings.items()
            },
        }


def _rates(found: Timings, tokens: int, flops: float, gemm: float, peak: float | None) -> dict[str, Any]:
    """Times of an arm, and what follows from their median; `peak` is of the dtype in which the arm multiplies."""
    record = found.as_dict()
    seconds = record["step_seconds"]["median"]
    rate = flops / seconds / 1e12
    return record | {
        "tokens_per_second": tokens * world_size() / seconds,
        "tokens_per_second_per_device": tokens / seconds,
        "model_tflops_per_second_per_device": rate,
        "mfu": rate / peak if peak else None,
        "mfu_of_gemm": rate / gemm,
    }


@contextlib.contextmanager
def fits(arm: str) -> Iterator[None]:
    """Turn running out of device memory into a `UserError` that names the arm."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"arm {arm} does not fit on this device: take a smaller --batch-size, --length or --rank, or --checkpointing"
        ) from error


def model_flops(ground: Ground, tokens: int) -> float:
    """FLOPs of one process's step by the formula above."""
    weights = adapted = 0
    targets = set(ground.settings.target_modules)
    for name, module in ground.base.named_modules():
        if isinstance(module, nn.Linear | bnb.nn.Linear4bit | Conv1D):
            d_in, d_out = linear_shape(module, name)
            weights += d_in * d_out
            if name.rpartition(".")[2] in targets:
                adapted += ground.settings.rank * (d_in + d_out)
    config = ground.base.config
    length = tokens / ground.settings.batch_size
    attention = 6 * config.num_hidden_layers * tokens * length * config.hidden_size
    if "CausalLM" not in type(ground.base).__name__:  # an encoder attends to all pairs
        attention *= 2
    return float(tokens * (4 * weights + 6 * adapted) + attention)


def _mean_tokens(ground: Ground, seed: int, rounds: Rounds) -> int:
    """Positions a batch has on average, padding included, where rows differ in length."""
    steps = range(rounds.rounds * rounds.steps)
    sizes = [positions(ground, ground.source.batch(seed, step, rank(), world_size())) for step in steps]
    return round(sum(sizes) / len(sizes))


def positions(ground: Ground, batch: Batch) -> int:
    """Positions that a batch has in the model: its tokens, or for images the patches and the class token."""
    if "input_ids" in batch:
        return batch["input_ids"].numel()
    config, pixels = ground.base.config, batch["pixel_values"]
    side = getattr(config, "patch_size", None)
    patches = (pixels.shape[-1] // side) * (pixels.shape[-2] // side) + 1 if isinstance(side, int) else 1
    return len(pixels) * patches


def table(record: dict[str, Any]) -> str:
    """The arms as lines of text, for the terminal."""
    head = ("arm", "step s", "[95 %]", "x", "[95 %]", "tokens/s", "peak GB", "J/step", "MFU")
    rows = [head]
    for key, arm in record["arms"].items():
        step, ratio = arm["step_seconds"], arm.get("overhead")
        mfu = arm.get("mfu") or arm.get("mfu_of_gemm")
        peak, joules = arm.get("peak_allocated_bytes"), arm.get("joules_per_step")
        rows.append(
            (
                key,
                f"{step['median']:.4g}",
                f"{step['low']:.4g}-{step['high']:.4g}",
                "1" if ratio is None else f"{ratio['ratio']:.3f}",
                "" if ratio is None else f"{ratio['low']:.3f}-{ratio['high']:.3f}",
                f"{arm['tokens_per_second']:,.0f}" if "tokens_per_second" in arm else "–",
                f"{peak / 1e9:.2f}" if peak else "–",
                f"{joules:.0f}" if joules else "–",
                f"{100 * mfu:.1f} %" if mfu else "–",
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    lines = ([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in rows)
    return "\n".join(map("  ".join, lines))
