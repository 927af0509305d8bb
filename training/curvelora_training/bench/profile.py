"""`curvelora bench profile`: where the GPU's time of a training step goes, kernel by kernel."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from curvelora_eval.environment import describe_environment
from curvelora_training.bench.adapted import set_update_std
from curvelora_training.bench.ground import Ground
from curvelora_training.garbage import uncollected

# what a kernel is for, by the first pattern that its name matches
KINDS = {
    "kernels: merged weight": r"_merged_weight|_decoded",
    "kernels: gradients of A and B": r"^_gradients|^_sums",
    "kernels: dropout": r"^_dropped",
    "kernels: FP8 codes, thin products, bounds": r"^_first_readings|^_second_readings|^_thin|^_norms",
    "attention": r"flash|fmha|cudnn_generated|sdpa|attention",
    "NF4 dequantisation (bitsandbytes)": r"[dD]equantize|kgemm_4bit",
    "Liger: norms, SwiGLU, RoPE, loss": r"liger|_rms_norm|_swiglu|_rope|_triton_rope|cross_entropy|_element_mul",
    "matrix products": r"gemm|nvjet|cutlass|xmma|splitKreduce",
    "optimiser and clipping": r"multi_tensor|FusedAdam|lpnorm|LpNorm",
    "copies and fills": r"[mM]emcpy|[mM]emset|[cC]opy|[fF]ill",
    "elementwise and reductions": r"^_rounded|elementwise|reduce|softmax|index|cat|embedding",
}
# lengths of gaps between kernels, microseconds
GAPS = (("below 5 us", 0, 5), ("5 to 50 us", 5, 50), ("50 us to 1 ms", 50, 1000), ("1 ms and more", 1000, float("inf")))


def measure_profile(
    ground: Ground, update_std: float, steps: int, say: Callable[[str], None] = print
) -> dict[str, Any]:
    """The record of `bench profile`: for every arm milliseconds of a step by kind and by kernel (mean over `steps`).

    Args:
        update_std: standard deviation of the entries of BA; never 0.
        steps: profiled steps, after two that are not.
    """
    arms = {}
    for arm in ground.settings.arms:
        trial = ground.trial(arm, ground.settings.seeds[0], at_peak=True)
        set_update_std(trial.model, update_std, ground.settings.seeds[0])

        def step(number: int, trial: Any = trial) -> None:
            trial.step(ground.source.batch(ground.settings.seeds[0], number, 0, 1))

        with uncollected():
            for number in range(2):
                step(number)
            torch.cuda.synchronize()
            started = time.perf_counter()
            step(2)
            torch.cuda.synchronize()
            wall = time.perf_counter() - started
            with profile(activities=[ProfilerActivity.CUDA]) as profiler:
                for number in range(steps):
                    step(3 + number)
                torch.cuda.synchronize()
        arms[arm.key] = _summary(profiler, steps) | {"step_seconds": wall, **trial.computed}
        say(f"{arm.key}: {wall * 1e3:.0f} ms a step\n{kinds_table(arms[arm.key])}")
        del trial, step
        torch.cuda.empty_cache()
    return {
        "schema": 1,
        "kind": "bench_profile",
        "settings": ground.settings.as_dict(),
        "environment": describe_environment(),
        "device": ground.device.name,
        "std_BA_target": update_std,
        "steps": steps,
        "arms": arms,
    }


def _summary(profiler: profile, steps: int) -> dict[str, Any]:
    kernels: dict[str, list[float]] = {}
    ran = []
    for event in profiler.events():
        if event.device_type == DeviceType.CUDA:
            ran.append((event.time_range.start, event.time_range.end, event.name[:200]))
            found = kernels.setdefault(event.name, [0.0, 0])
            found[0] += event.device_time_total / 1e3 / steps
            found[1] += 1 / steps
    kinds: dict[str, float] = {}
    for name, (milliseconds, _) in kernels.items():
        kind = kind_of(name)
        kinds[kind] = kinds.get(kind, 0.0) + milliseconds
    ranked = sorted(kernels.items(), key=lambda item: -item[1][0])
    return {
        "busy_milliseconds": sum(ms for ms, _ in kernels.values()),
        "idle": idle_of(ran, steps),
        "kinds": dict(sorted(kinds.items(), key=lambda item: -item[1])),
        "kernels": [{"name": name[:200], "milliseconds": ms, "calls": calls} for name, (ms, calls) in ranked[:60]],
    }


def idle_of(ran: list[tuple[float, float, str]], steps: int) -> dict[str, Any]:
    """Where a GPU had nothing to run between its first kernel and its last.

    Short gaps are what one kernel takes to follow another; in long ones it waited for the host.

    Args:
        ran: (start, end, name) of every kernel, in microseconds, in any order.
        steps: how many steps they are of.

    Returns:
        milliseconds: a step, of all gaps.
        gaps: length -> {"count", "milliseconds"} a step.
        longest: the twelve longest of all steps, each with its milliseconds and the kernels after and before it.
    """
    gaps = []
    end, last = None, ""
    for start, stop, name in sorted(ran):
        if end is not None and start > end:
            gaps.append((start - end, last, name))
        if end is None or stop > end:
            end, last = stop, name
    table = {}
    for word, low, high in GAPS:
        found = [length for length, *_ in gaps if low <= length < high]
        table[word] = {"count": len(found) / steps, "milliseconds": sum(found) / 1e3 / steps}
    longest = sorted(gaps, key=lambda gap: -gap[0])[:12]
    return {
        "milliseconds": sum(length for length, *_ in gaps) / 1e3 / steps,
        "gaps": table,
        "longest": [
            {"milliseconds": length / 1e3, "after": after, "before": before} for length, after, before in longest
        ],
    }


def kind_of(name: str) -> str:
    """What a kernel of this name is for: a key of `KINDS`, or "other"."""
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, name)), "other")


def kinds_table(arm: dict[str, Any]) -> str:
    """The kinds of one arm, in Markdown, the longest first."""
    rows = [f"| {kind} | {ms:.1f} |" for kind, ms in arm["kinds"].items()]
    rows.append(f"| **all** | **{arm['busy_milliseconds']:.1f}** |")
    for word, gaps in arm["idle"]["gaps"].items():
        rows.append(f"| idle, {gaps['count']:.0f} gaps {word} | {gaps['milliseconds']:.1f} |")
    return "\n".join(["| kernels | ms a step |", "|---|---:|", *rows])
