"""Our model, with or without an adapter, as a model of lm-evaluation-harness."""

from __future__ import annotations

from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from torch import nn


class AdaptedModel(HFLM):
    """A loaded model and its tokenizer.

    Log-probabilities are taken in float32, and a half-precision base runs under autocast, as in `curvelora eval`: lm-eval alone
    would take the softmax in the base's own dtype.

    Args:
        model: a causal language model, also one wrapped by PEFT; set to eval mode.
        batch_size: requests a forward pass.
        about: facts that go into the results.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, batch_size: int, about: dict[str, Any]) -> None:
        half = model.config.dtype if model.config.dtype in (torch.bfloat16, torch.float16) else None
        super().__init__(
            pretrained=model,
            backend="causal",
            tokenizer=tokenizer,
            batch_size=batch_size,
            softmax_dtype=torch.float32,
            mixed_precision_dtype=half,
        )
        self.about = about

    def get_model_info(self) -> dict[str, Any]:
        """What is known of the model; lm-eval's own version asks the hub."""
        return self.about
