"""Which kernels a run computes with, as the recipe says, and the line that tells the user."""

from __future__ import annotations

import torch
from peft import PeftModel

from curvelora.kernels import use_kernels
from curvelora_training.config import TrainingSpec
from curvelora_training.liger import use_liger


def choose_kernels(model: PeftModel, spec: TrainingSpec, fsdp: bool = False) -> str | None:
    """Have `model` take the kernels that the recipe allows.

    Args:
        model: with its adapter and its weights.
        fsdp: FSDP2 will share the base, with which fused kernels have not been tried.

    Returns: what came of it, in a line; None where there is nothing to say, as on a CPU.

    Raises:
        UserError: Liger's kernels cannot be had.
    """
    fused, reasons = use_kernels(model, "off" if fsdp else spec.kernels)
    if spec.liger:
        use_liger(model.get_base_model(), spec.keep_products > 0)
    if not (fused or spec.liger or torch.cuda.is_available()):
        return None
    others = ["FSDP2 shares the base"] if fsdp else [f"{count} {reason}" for reason, count in reasons.most_common()]
    why = f" (not: {'; '.join(others)})" if others else ""
    liger = ", the rest of the model by liger-kernel" * spec.liger
    return f"fused kernels: {fused} of {fused + reasons.total()} adapter layers{why}{liger}"
