"""Protocol perplexity: windows slide over each text, and every token but the first of a text is predicted exactly once."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import nn

from curvelora_eval.benchmarks.protocols import PerplexityProtocol, Row
from curvelora_eval.predict.base import Output, Predictor, finite, largest_difference
from curvelora_eval.predict.choices import logits_from, summed_log_probabilities
from curvelora_eval.tasks.base import device_of

SAME = 1e-3  # losses of a window that are relatively no further apart count as the same answer


class Perplexity(Predictor):
    """One sequence and one record a window, so that a bootstrap over records has something to draw from: a benchmark may be one
    text.

    Args:
        protocol: gives the text, the window and the stride.
        rows, tokenizer, limit, quirks: as for `Generate`; nothing is over the limit, since windows are not longer.
    """

    unit = "window"

    def __init__(
        self,
        protocol: PerplexityProtocol,
        template: str,
        rows: Sequence[Row],
        tokenizer: Any,
        limit: int | None,
        quirks: Collection[str] = (),
    ) -> None:
        self.protocol, self.rows = protocol, rows
        self.over_limit: set[int] = set()
        self.pad = tokenizer.pad_token_id or 0
        self.window = min(protocol.window, limit or protocol.window)
        # half a window of context at least, also where the model's limit makes windows smaller than the protocol's
        self.stride = protocol.stride if self.window == protocol.window else min(protocol.stride, max(1, self.window // 2))
        texts = tokenizer([protocol.text(row) for row in rows], verbose=False)["input_ids"]
        self.places: list[tuple[int, int]] = []  # of a unit: the row, and which of its windows
        self.windows: list[tuple[list[int], int]] = []
        for i, ids in enumerate(texts):
            for number, (begin, counted, end) in enumerate(windows(len(ids), self.window, self.stride)):
                self.places.append((i, number))
                self.windows.append((ids[begin:end], end - counted))
        self.lengths = [len(ids) for ids, _ in self.windows]

    @property
    def decoding(self) -> dict[str, Any]:
        return {"window": self.window, "stride": self.stride}

    def predict(self, model: nn.Module, units: Sequence[int]) -> list[Output]:
        width = max(self.lengths[unit] for unit in units)
        device = device_of(model)
        padded = [self.windows[u][0] + [self.pad] * (width - self.lengths[u]) for u in units]
        mask = [[1] * self.lengths[u] + [0] * (width - self.lengths[u]) for u in units]
        starts = [self.lengths[u] - self.windows[u][1] - 1 for u in units]  # predicts the first token that counts
        first = min(starts)
        logits = logits_from(model, torch.tensor(padded, device=device), torch.tensor(mask, device=device), first)
        sums = [
            summed_log_probabilities(logits[k, start - first :], self.windows[u][0][start + 1 :])
            for k, (u, start) in enumerate(zip(units, starts, strict=True))
        ]
        counts = (self.windows[u][1] for u in units)
        return [{"nll": finite(-s), "tokens": n} for s, n in zip(torch.stack(sums).tolist(), counts, strict=True)]

    def records(self, outputs: dict[int, Output]) -> list[dict[str, Any]]:
        return [
            {"row": row, "window": window, "id": f"{self.rows[row].id}/{window}", **outputs[unit]}
            for unit, (row, window) in enumerate(self.places)
            if unit in outputs
        ]

    def differs(self, first: Sequence[Output], second: Sequence[Output]) -> tuple[bool, float | None]:
        a, b = first[0]["nll"], second[0]["nll"]
        apart = largest_difference([a], [b])
        return (a != b if apart is None else apart > SAME * abs(a)), apart  # no number is the same as no number


def windows(length: int, window: int, stride: int) -> list[tuple[int, int, int]]:
    """(begin, first token that counts, end) of each window over `length` tokens; together they count 1..length - 1.

    A window begins `stride` tokens after the last one, and no later than one token before the first that counts: that token needs
    something to follow.
    """
    found = []
    begin, counted = 0, 1
    while counted < length:
        end = min(begin + window, length)
        found.append((begin, counted, end))
        begin, counted = min(begin + stride, end - 1), end
    return found
