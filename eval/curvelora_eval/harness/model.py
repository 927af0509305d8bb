"""Our model, with or without an adapter, as a model of lm-evaluation-harness."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
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
        with quiet():
            super().__init__(
                pretrained=model,
                backend="causal",
                tokenizer=tokenizer,
                batch_size=batch_size,
                softmax_dtype=torch.float32,
                mixed_precision_dtype=half,
            )
        self.about = about
        self.cut = 0
        """Requests longer than the model's limit: lm-eval cuts their beginning off."""

    def _loglikelihood_tokens(self, requests: Any, *arguments: Any, **options: Any) -> list[tuple[float, bool]]:
        self.cut += sum(len(context) + len(ending) > self.max_length + 1 for _, context, ending in requests)
        return super()._loglikelihood_tokens(requests, *arguments, **options)

    def tok_batch_encode(
        self, strings: Any, padding_side: str = "left", left_truncate_len: int | None = None, truncation: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """lm-eval's own, called for prompts of generative tasks; those that are longer than `left_truncate_len` are counted."""
        # Encoded whole first, with the same special tokens: padding must not count, and what is cut cannot be counted later.
        ids, mask = super().tok_batch_encode(strings, padding_side, None, truncation)
        if left_truncate_len:
            self.cut += int((mask.sum(dim=1) > left_truncate_len).sum())
            ids, mask = ids[:, -left_truncate_len:], mask[:, -left_truncate_len:]
        return ids, mask

    def get_model_info(self) -> dict[str, Any]:
        """What is known of the model; lm-eval's own version asks the hub."""
        return self.about


@contextmanager
def quiet() -> Iterator[None]:
    """Without lm-eval's warnings: about a model object instead of a name, which is what we mean, and one for each request that
    it cuts, which are counted here.
    """
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
