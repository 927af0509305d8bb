"""Which kernels a run computes with, as the recipe says, and the line that tells the user."""

from __future__ import annotations

import torch
from peft import PeftConfig, PeftModel

from curvelora.errors import UserError
from curvelora.kernels import use_kernels
from curvelora.kernels.choice import environment_mode, why_no_triton
from curvelora.methods.loran import LoranConfig
from curvelora_training.config import TrainingSpec
from curvelora_training.distributed import gpus_elsewhere
from curvelora_training.liger import use_liger


def check_fp8(config: PeftConfig, dtype: str, shared: bool) -> None:
    """Raise `UserError` where `training.kernels: fp8` could act nowhere. Of a job elsewhere the GPUs are not known.

    Args:
        config: the adapter's.
        dtype: of the base's products.
        shared: whether DeepSpeed gathers the base by modules or FSDP2 shares it: its layers take no kernels then.
    """
    elsewhere = gpus_elsewhere()
    problem = None if elsewhere else why_no_triton(environment_mode())
    if not isinstance(config, LoranConfig):
        problem = f"it is for LoRAN's gradients, and {config.peft_type.value.lower()} has none of that kind"
    elif config.has_tensors or config.delta_map().activation.name in ("identity", "relu"):
        problem = "there is no bound on an f that is learned, has a schedule, or is the identity or relu"
    elif dtype != "bfloat16":
        problem = f"kernels multiply in bfloat16, and model.dtype is {dtype}"
    elif shared:
        problem = "no layer takes kernels where DeepSpeed gathers the base by modules or FSDP2 shares it (ZeRO-2 does neither)"
    elif problem is None and not elsewhere:
        from curvelora.kernels.fp8_gate import why_no_fp8

        problem = why_no_fp8(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    if problem is not None:
        raise UserError(f"training.kernels: fp8 would act nowhere: {problem}: write auto")


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
