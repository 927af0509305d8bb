"""`curvelora bench layer`: one linear layer under each arm, forward and backward, without a model around it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig

from curvelora_eval.environment import describe_environment
from curvelora_training.bench.adapted import arm_model, set_update_std, switch
from curvelora_training.bench.arms import Arm
from curvelora_training.bench.devices import Device
from curvelora_training.bench.interleave import Rounds, interleave, overheads
from curvelora_training.bench.random_base import STD, nf4_byte_table, random_nf4_linear
from curvelora_training.bench.trial import PhaseClock


class OneLayer(nn.Module):
    """A linear layer named `proj`, frozen, with what adapters ask of a model: a config."""

    def __init__(self, d_in: int, d_out: int, base: str, device: torch.device) -> None:
        super().__init__()
        dtype = torch.float32 if base == "fp32" else torch.bfloat16
        draw = torch.Generator(device).manual_seed(0)
        if base == "nf4":
            self.proj = random_nf4_linear(d_in, d_out, dtype, nf4_byte_table(device), draw)
        else:
            self.proj = nn.Linear(d_in, d_out, bias=False, device=device, dtype=dtype)
            self.proj.weight.data.normal_(0, STD, generator=draw)
        self.proj.requires_grad_(False)
        self.config = PretrainedConfig(dtype=dtype, initializer_range=STD)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (tokens, d_in) -> (tokens, d_out)."""
        return self.proj(x)

    def tie_weights(self) -> None:
        """Nothing is tied."""


class _LayerTurn:
    """A layer as the harness runs it: forward, and backward from a fixed gradient."""

    def __init__(self, model: nn.Module, x: torch.Tensor, grad: torch.Tensor, arm: Arm, device: Device) -> None:
        self.model, self.x, self.grad, self.arm = model, x, grad, arm
        self.clock, self.device = PhaseClock(device), device

    def enter(self) -> None:
        pass

    def run(self) -> dict[str, float]:
        self.x.grad = None
        self.model.zero_grad(set_to_none=True)
        half = self.x.dtype == torch.bfloat16 and not self.arm.fp32
        self.clock.mark("start")
        x = self.x.float() if self.arm.fp32 else self.x
        with torch.autocast(x.device.type, torch.bfloat16, enabled=half):
            y = self.model(x)
            self.clock.mark("forward")
        y.backward(self.grad.to(y.dtype))
        self.clock.mark("backward")
        return self.clock.seconds()

    def leave(self) -> None:
        self.model.zero_grad(set_to_none=True)


def measure_layers(
    shapes: list[tuple[int, int]],
    arms: list[Arm],
    base: str,
    tokens: int,
    options: dict[str, Any],
    update_std: float,
    rounds: Rounds,
    device: torch.device,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """The record of `bench layer`: for every shape, every arm's times and its overhead to the first arm.

    Args:
        shapes: (d_out, d_in) of each layer.
        options: r, alpha, dropout of every arm.
        update_std: standard deviation of the entries of BA; never 0.
    """
    box, measured = Device(device), []
    for d_out, d_in in shapes:
        layer = OneLayer(d_in, d_out, base, device)
        dtype = torch.float32 if base == "fp32" else torch.bfloat16
        draw = torch.Generator(device).manual_seed(1)
        x = torch.randn(tokens, d_in, device=device, dtype=dtype, generator=draw).requires_grad_(True)
        grad = torch.randn(tokens, d_out, device=device, dtype=dtype, generator=draw)
        turns, reached, computed = {}, {}, {}
        for arm in arms:
            model = arm_model(layer, arm, options | {"target_modules": ["proj"]}, [], 0, random=True)
            computed[arm.key] = switch(model, arm)
            reached[arm.key] = set_update_std(model, update_std)
            turns[arm.key] = _LayerTurn(model.train(), x, grad, arm, box)
        say(f"{d_out} x {d_in}, {tokens:,} tokens")
        resident = torch.cuda.memory_allocated(device) if box.is_gpu else None
        *_, timings = interleave(turns, rounds, box, say)
        ratios = overheads(timings, arms[0].key)
        rows = {
            k: {"std_BA": reached[k], **computed[k], **t.as_dict(), "overhead": ratios[k]} for k, t in timings.items()
        }
        for row in rows.values():
            peak = row["peak_allocated_bytes"]
            row["extra_bytes"] = None if peak is None else peak - resident
        measured.append({"d_out": d_out, "d_in": d_in, "arms": rows})
        del turns, layer
    return {
        "schema": 1,
        "kind": "bench_layer",
        "settings": {"base": base, "tokens": tokens, **options, "arms": [arm.as_dict() for arm in arms]},
        "environment": describe_environment(),
        "device": box.name,
        "std_BA_target": update_std,
        "rounds": rounds.rounds,
        "steps_per_round": rounds.steps,
        "warmup_steps": rounds.warmup,
        "gemm_tflops": box.gemm_tflops(torch.float32 if base == "fp32" else torch.bfloat16),
        "peak_tflops": box.peak_tflops,
        "clocks": box.clocks(),
        "layers": measured,
    }
