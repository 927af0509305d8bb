"""The loop of the papers' scripts, written anew: one row at a time, in the order of the file.

    prompt -> tokens -> generate (4 beams; with use_cache=False for arithmetic) -> text -> what follows "### Response:"

As in LLM-Adapters' commonsense_evaluate.py and evaluate.py, `generate` also returns the scores of every step, which nobody reads.
Other than there, sampling is switched off by name, dropout is off, and nothing is printed or written between rows: each of these
would make the loop slower or its answers random.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig

from curvelora_eval.benchmarks import Row
from curvelora_eval.benchmarks.protocols import GenerateProtocol
from curvelora_eval.tasks.base import compute_context, device_of

MARK = "### Response:"


@dataclass(frozen=True)
class Answer:
    """What the loop made of one row."""

    text: str
    prediction: Any
    new_tokens: int
    seconds: float


def answer_rows(
    model: nn.Module,
    tokenizer: Any,
    protocol: GenerateProtocol,
    template: str,
    rows: Sequence[Row],
    use_cache: bool,
) -> list[Answer]:
    """One answer a row.

    Args:
        model: in eval mode.
        use_cache: False computes all keys and values again for every new token, as the arithmetic script does.
    """
    answers = []
    for row in rows:
        started = time.perf_counter()
        inputs = tokenizer(protocol.prompt(row, template), return_tensors="pt").to(device_of(model))
        settings = GenerationConfig(
            do_sample=False,
            num_beams=protocol.num_beams,
            max_new_tokens=protocol.max_new_tokens,
            use_cache=use_cache,
            pad_token_id=tokenizer.pad_token_id,
            return_dict_in_generate=True,
            output_scores=True,
        )
        with torch.no_grad(), compute_context(model):
            generated = model.generate(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                generation_config=settings,
            )
        sequence = generated.sequences[0]
        whole = tokenizer.decode(sequence, skip_special_tokens=protocol.skip_special_tokens)
        text = whole.split(MARK, 1)[1]
        new = len(sequence) - inputs["input_ids"].shape[1]
        answers.append(Answer(text, protocol.extract(text, row), new, time.perf_counter() - started))
    return answers
