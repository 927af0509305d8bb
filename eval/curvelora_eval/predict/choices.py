"""Protocol loglikelihood: the sum of log p(token | what stands before it) over the tokens of each choice.

Choices are tokenised as lm-evaluation-harness does it, so that numbers agree: context and continuation are encoded as one text,
and the tokens after those of the context alone are the continuation; blanks at the end of a context belong to the continuation.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from curvelora_eval.benchmarks.protocols import ChoiceProtocol, Row
from curvelora_eval.predict.base import Output, Predictor, finite, largest_difference
from curvelora_eval.tasks.base import device_of

CHUNK = 1 << 26  # logits held in fp32 at a time (256 MiB)


class Choices(Predictor):
    """One sequence a choice.

    Args:
        protocol: gives (context, continuation) of every choice.
        rows, tokenizer, limit, quirks: as for `Generate`; a row is over the limit where one of its choices is.
    """

    unit = "choice"

    def __init__(
        self,
        protocol: ChoiceProtocol,
        template: str,
        rows: Sequence[Row],
        tokenizer: Any,
        limit: int | None,
        quirks: Collection[str] = (),
    ) -> None:
        self.protocol, self.rows = protocol, rows
        encoded = [[encode_pair(tokenizer, *pair) for pair in protocol.pairs(row)] for row in rows]
        # the last token of a choice is only predicted, never read
        self.over_limit = {
            i for i, pairs in enumerate(encoded) if limit and any(len(c) + len(x) - 1 > limit for c, x in pairs)
        }
        self.row_of = [i for i, pairs in enumerate(encoded) for _ in pairs if i not in self.over_limit]
        self.pairs = [pair for i, pairs in enumerate(encoded) for pair in pairs if i not in self.over_limit]
        self.lengths = [len(context) + len(continuation) - 1 for context, continuation in self.pairs]
        self.pad = tokenizer.pad_token_id or 0

    def predict(self, model: nn.Module, units: Sequence[int]) -> list[Output]:
        width = max(self.lengths[unit] for unit in units)
        sequences = [self.pairs[u][0] + self.pairs[u][1][:-1] for u in units]
        device = device_of(model)
        inputs = torch.tensor([ids + [self.pad] * (width - len(ids)) for ids in sequences], device=device)
        mask = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids in sequences], device=device)
        # the logits at position p predict token p + 1, and the first token of the continuation follows the context's last
        starts = [len(self.pairs[u][0]) - 1 for u in units]
        first = min(starts)
        logits = logits_from(model, inputs, mask, first)
        sums = [
            summed_log_probabilities(logits[k, start - first :], self.pairs[unit][1])
            for k, (unit, start) in enumerate(zip(units, starts, strict=True))
        ]
        return [{"log_probability": finite(value)} for value in torch.stack(sums).tolist()]

    def records(self, outputs: dict[int, Output]) -> list[dict[str, Any]]:
        said: dict[int, list[Output]] = {}
        for unit, row in enumerate(self.row_of):
            if unit in outputs:
                said.setdefault(row, []).append(outputs[unit])
        records = []
        for i, row in enumerate(self.rows):
            lengths = self.protocol.lengths(row)
            record = {"row": i, "id": row.id, "prediction": None, "reference": self.protocol.reference(row)}
            record |= {"scores": None, "prediction_norm": None}
            if i in self.over_limit:
                records.append(record | {"over_limit": True})
            elif len(found := said.get(i, [])) == len(lengths):
                scores = [output["log_probability"] for output in found]
                record["scores"] = scores
                if None not in scores:  # one that is not a number leaves nothing to compare
                    record["prediction"] = best(scores)
                    record["prediction_norm"] = best([s / n for s, n in zip(scores, lengths, strict=True)])
                records.append(record)
        return records

    def together(self, unit: int) -> list[int]:
        return [u for u, row in enumerate(self.row_of) if row == self.row_of[unit]]

    def differs(self, first: Sequence[Output], second: Sequence[Output]) -> tuple[bool, float | None]:
        sides = [[output["log_probability"] for output in side] for side in (first, second)]
        # a choice whose probability is not a number leaves no answer, which is the same as no answer
        first_best, second_best = (None if None in side else best(side) for side in sides)
        return first_best != second_best, largest_difference(*sides)


def best(scores: Sequence[float]) -> int:
    """The index of the largest score; the first of equal ones."""
    return max(range(len(scores)), key=lambda i: scores[i])


def encode_pair(tokenizer: Any, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Token ids of a context and of its continuation (each at least one token)."""
    blanks = len(context) - len(context.rstrip())
    if blanks:
        context, continuation = context[:-blanks], context[-blanks:] + continuation
    if not context:
        start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        return [start], tokenizer.encode(continuation, add_special_tokens=False)
    before = tokenizer.encode(context)
    return before, tokenizer.encode(context + continuation)[len(before) :]


def logits_from(model: nn.Module, inputs: torch.Tensor, mask: torch.Tensor, first: int) -> torch.Tensor:
    """Logits (rows, positions from `first` on, vocabulary); the others are never made where the model can leave them out."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    options: dict[str, Any] = {"use_cache": False}
    if "logits_to_keep" in inspect.signature(base.forward).parameters:
        # a number of 0 means all of them, and there is always one to keep
        return model(input_ids=inputs, attention_mask=mask, logits_to_keep=inputs.shape[1] - first, **options).logits
    return model(input_ids=inputs, attention_mask=mask, **options).logits[:, first:]


def summed_log_probabilities(logits: torch.Tensor, tokens: Sequence[int]) -> torch.Tensor:
    """Sum of log p over `tokens`, of which `logits` (at least as many positions, vocabulary) predict one each; in fp32."""
    wanted = torch.tensor(tokens, device=logits.device)
    total = torch.zeros((), device=logits.device, dtype=torch.float64)
    step = max(1, CHUNK // logits.shape[-1])
    for start in range(0, len(tokens), step):
        part = logits[start : min(start + step, len(tokens))].float()
        total -= F.cross_entropy(part, wanted[start : start + step], reduction="sum")
    return total
