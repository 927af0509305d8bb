"""Which kernels a run computes with, as the recipe says, and the line that tells the user."""

from __future__ import annotations

import torch
from peft import PeftModel

from curvelora.errors import UserError
from curvelora.kernels import use_kernels
from curvelora_training.config import TrainingSpec
from curvelora_training.liger import use_liger


def check_fp8(method: str, shared: bool) -> None:
    """Raise `UserError` where `training.kernels: fp8` could act nowhere.

    Args:
        method: the adapter's.
        shared: whether DeepSpeed gathers the base by modules or FSDP2 shares it: its layers take no kernels then.
    """
    if method != "loran":
        raise UserError(
            f"training.kernels: fp8 is for LoRAN's gradients, and {method} has none of that kind: write auto"
        )
    if shared:
        raise UserError(
            "training.kernels: fp8 has no layers to act on where DeepSpeed gathers the base by modules or FSDP2 shares it: "
            "write auto, or take ZeRO-2"
        )
    if not torch.cuda.is_available():
        raise UserError("training.kernels: fp8 needs a GPU: write auto here")
    from curvelora.kernels.fp8_gate import why_no_fp8

    if (reason := why_no_fp8(torch.device("cuda"))) is not None:
        raise UserError(f"training.kernels: fp8 cannot be had on {reason}")


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
    fp8 = ", FP8 in their gradients where its error is bounded" * (spec.kernels == "fp8" and not fsdp)
    return f"fused kernels: {fused} of {fused + reasons.total()} adapter layers{why}{fp8}{liger}"
