"""Protocol head: a class or a number from a head that was trained with the adapter; the existing task kinds do the work."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from datasets import Dataset
from torch import nn

from curvelora_eval.benchmarks.protocols import HeadProtocol, Row
from curvelora_eval.predict.base import Output, Predictor, finite, largest_difference
from curvelora_eval.tasks.base import device_of
from curvelora_eval.tasks.classification import TextTask

SAME = 1e-3


class Head(Predictor):
    """One text (or pair) a row.

    Args:
        protocol: gives the columns of a row and the classes.
        task: the task kind with the adapter's own settings: where inputs are cut, and the order of the head's classes.
        rows, tokenizer: as for `Generate`.
        limit: of the model; inputs are cut there or at the task's max_length, as in training, and counted.
    """

    def __init__(
        self, protocol: HeadProtocol, task: TextTask, rows: Sequence[Row], tokenizer: Any, limit: int | None
    ) -> None:
        self.protocol, self.task, self.rows, self.tokenizer = protocol, task, rows, tokenizer
        self.over_limit: set[int] = set()
        table = Dataset.from_list([protocol.columns(row) for row in rows])
        most = min(task.spec.max_length, limit or task.spec.max_length)
        texts = [[str(text) for text in table[name]] for name in ("text", "text_pair") if name in table.column_names]
        whole = tokenizer(*texts, verbose=False)
        self.cut = sum(len(ids) > most for ids in whole["input_ids"])
        self.encoded = dict(tokenizer(*texts, truncation=True, max_length=most)) if self.cut else dict(whole)
        self.lengths = [len(ids) for ids in self.encoded["input_ids"]]
        # the head's outputs in the benchmark's order of classes
        classes = list(protocol.labels or ())
        self.order = [task.spec.labels.index(name) for name in classes] if classes else [0]

    def predict(self, model: nn.Module, units: Sequence[int]) -> list[Output]:
        batch = self.tokenizer.pad({k: [v[u] for u in units] for k, v in self.encoded.items()}, return_tensors="pt")
        logits = model(**batch.to(device_of(model))).logits.float()[:, self.order]
        return [{"logits": [finite(value) for value in row]} for row in logits.tolist()]

    def records(self, outputs: dict[int, Output]) -> list[dict[str, Any]]:
        return [
            {
                "row": i,
                "id": row.id,
                "prediction": self._read(outputs[i]["logits"]),
                "reference": self.protocol.reference(row),
                "logits": outputs[i]["logits"],
            }
            for i, row in enumerate(self.rows)
            if i in outputs
        ]

    def _read(self, logits: list[float | None]) -> int | float | None:
        if None in logits:
            return None
        return int(torch.tensor(logits).argmax()) if self.protocol.labels else logits[0]

    def differs(self, first: Sequence[Output], second: Sequence[Output]) -> tuple[bool, float | None]:
        a, b = first[0]["logits"], second[0]["logits"]
        apart = largest_difference(a, b)
        if self.protocol.labels or apart is None:  # no answer is the same as no answer
            return self._read(a) != self._read(b), apart
        return apart > SAME * max(1.0, abs(a[0])), apart  # the same number to three digits
