"""The goals table of docs/performance.md, from the records of `bench step` under docs/results/performance.

python -m curvelora_training.bench.performance_table docs/results/performance
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

STEP, KEPT, LARGE, IN_BF16 = "step_7b_h200.json", "kept_7b_h200.json", "step_70b_h200.json", "step_7b_h200_bf16.json"
UNSLOTH, UNSLOTH_OWN = "unsloth_7b_h200.json", "unsloth_7b_h200_own.json"
PROFILE = "profile_7b_h200.json"


@dataclass(frozen=True)
class Row:
    """A goal: seconds of an arm's step, or its ratio to `baseline` where there is one."""

    label: str
    file: str
    arm: str
    goal: float | None
    baseline: str | None = None


ROWS = (
    Row("PEFT QLoRA", STEP, "qlora@eager", None),
    Row("PEFT QLoRA, Liger", STEP, "qlora@eager@liger", None),
    Row("Unsloth's QLoRA", UNSLOTH, "unsloth", None),
    Row("the same, its own checkpointing", UNSLOTH_OWN, "unsloth", None),
    Row("QLoRA, kernels", STEP, "qlora", None),
    Row("**QLoRA, kernels, Liger**", STEP, "qlora@liger", 0.62),
    Row("LoRAN Sinter, kernels", STEP, "loran:sinter", None),
    Row("**LoRAN Sinter, kernels, Liger**", STEP, "loran:sinter@liger", 0.78),
    Row("the same, FP8 for the gradients beyond f'(0)", STEP, "loran:sinter@liger@fp8", 0.72),
    Row("LoRAN with tanh, kernels, Liger", STEP, "loran:tanh@liger", 0.78),
    Row("PEFT QLoRA, Liger, dropout 0.05", STEP, "peft_dropped", None),
    Row("QLoRA, kernels, Liger, dropout 0.05", STEP, "dropped", None),
    Row("LoRAN Sinter, kernels, Liger, dropout 0.05, `dropout_form: exact`", STEP, "exact", 1.30),
    Row("the same, dropout 0.05, `dropout_form: features`", STEP, "features", 0.85),
    Row("QLoRA, kernels, Liger, all activations kept", KEPT, "qlora@liger", 0.50),
    Row("LoRAN Sinter, kernels, Liger, all activations kept", KEPT, "loran:sinter@liger", None),
    Row("bf16 base: PEFT LoRA, Liger", IN_BF16, "lora@eager@liger", None),
    Row("bf16 base: LoRA, kernels, Liger", IN_BF16, "lora@liger", None),
    Row("bf16 base: LoRAN Sinter, kernels, Liger", IN_BF16, "loran:sinter@liger", None),
    Row("the same, FP8 for the gradients beyond f'(0)", IN_BF16, "loran:sinter@liger@fp8", None),
    Row("bf16 base: PEFT LoRA, Liger, dropout 0.05", IN_BF16, "peft_dropped", None),
    Row("bf16 base: LoRA, kernels, Liger, dropout 0.05", IN_BF16, "dropped", None),
    Row("70B shape: LoRAN over QLoRA, kernels and Liger in both", LARGE, "loran:sinter@liger", 1.30, "qlora@liger"),
    Row("the same, FP8 for the gradients beyond f'(0)", LARGE, "loran:sinter@liger@fp8", 1.30, "qlora@liger"),
)
HEAD = "| what | device | goal | measured | tokens/s | peak GB |\n|---|---|---:|---:|---:|---:|"


def performance_table(folder: Path) -> str:
    """The table in Markdown; an arm that a record lacks is said to be unmeasured. GB are 1e9 bytes.

    In brackets is the interval of the median: with two turns the lower and the higher of their medians.

    Raises:
        OSError: a record is missing.
    """
    records: dict[str, Any] = {
        name: json.loads((folder / name).read_text(encoding="utf-8")) for name in {row.file for row in ROWS}
    }
    lines = [HEAD]
    for row in ROWS:
        record = records[row.file]
        goal = "–" if row.goal is None else f"≤ {row.goal:.2f} s"
        if (arm := record["arms"].get(row.arm)) is None:
            lines.append(f"| {row.label} | – | {goal} | not measured | – | – |")
            continue
        step = arm["step_seconds"]
        found = f"{step['median']:.3f} s ({step['low']:.3f} to {step['high']:.3f})"
        if row.baseline is not None:
            other = record["arms"][row.baseline]["step_seconds"]["median"]
            found = f"{step['median'] / other:.2f} x ({step['median']:.2f} s to {other:.2f} s)"
            goal = f"≤ {row.goal:.2f} x"
        device = record["device"].removeprefix("NVIDIA ").removesuffix(" HBM3")
        rate, peak = arm["tokens_per_second_per_device"], arm["peak_allocated_bytes"]
        lines.append(f"| {row.label} | {device} | {goal} | {found} | {rate:,.0f} | {peak / 1e9:.1f} |")
    return "\n".join(lines)


def profile_table(folder: Path) -> str:
    """Milliseconds of a step by kind of kernel, an arm a column, in Markdown; the longest of the first arm first.

    Raises:
        OSError: the record is missing.
    """
    arms = json.loads((folder / PROFILE).read_text(encoding="utf-8"))["arms"]
    kinds = list(dict.fromkeys(kind for arm in arms.values() for kind in arm["kinds"]))
    lines = [f"| kernels | {' | '.join(arms)} |", f"|---|{'---:|' * len(arms)}"]
    for kind in kinds:
        lines.append(f"| {kind} | {' | '.join(format(arm['kinds'].get(kind, 0.0), '.1f') for arm in arms.values())} |")
    busy = [f"{arm['busy_milliseconds']:.1f}" for arm in arms.values()]
    whole = [f"{arm['step_seconds'] * 1e3:.0f}" for arm in arms.values()]
    return "\n".join([*lines, f"| **the GPU is busy** | {' | '.join(busy)} |", f"| **step** | {' | '.join(whole)} |"])


if __name__ == "__main__":
    print(performance_table(Path(sys.argv[1])), profile_table(Path(sys.argv[1])), sep="\n\n")
