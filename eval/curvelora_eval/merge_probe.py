"""The rows on which a model is compared before and after its adapter is merged."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset, Features, Image, Value
from PIL.Image import fromarray

from curvelora_eval.tasks import Task, make_task

IMAGES = 16
SENTENCES = (
    *("The river rose after three days of rain.", "She opened the letter and read it twice.", "It is cold today."),
    *("A good film, if a little too long for what it has to say.", "Nobody answered the telephone.", "Why not?"),
    *("The committee meets on the first Monday of every month.", "He sold 240 apples and kept 12 for himself."),
    *("I did not like the ending, but the music was wonderful.", "Water boils at 100 degrees at sea level."),
    *("They walked along the coast until it was dark.", "The new law comes into force next year, officials said."),
    *("What a dull and lifeless performance!", "The engine stopped twice before we reached the village."),
    *("Please send the report to both offices by Friday.", "Cells divide when a signal tells them to."),
)


@dataclass(frozen=True)
class Probe:
    """Rows on which models are compared.

    Args:
        task: how they are encoded, as in evaluation.
        rows: the rows.
        batch_size: rows a batch.
        source: where they come from, as plain data.
        labelled: whether their labels mean something, so that the loss does.
    """

    task: Task
    rows: Dataset
    batch_size: int
    source: dict[str, Any]
    labelled: bool

    def batches(self, processor: Any) -> list[dict[str, torch.Tensor]]:
        """Padded batches with labels, on the CPU."""
        encoded, collate = self.task.encode(self.rows, processor), self.task.collator(processor)
        starts = range(0, len(self.rows), self.batch_size)
        chosen = ([encoded[i] for i in range(s, min(s + self.batch_size, len(self.rows)))] for s in starts)
        return [dict(collate(features)) for features in chosen]


def fixed_probe(task: Task, batch_size: int) -> Probe:
    """The same few sentences (images of coloured noise) for every model, in the columns that the task kind reads."""
    kind = task.spec.kind
    features = None
    if kind == "image_classification":
        squares = np.random.default_rng(0).integers(0, 256, (IMAGES, 8, 8, 3), dtype=np.uint8)
        columns = {"image": [fromarray(square).resize((64, 64)) for square in squares], "label": [0] * IMAGES}
        features = Features({"image": Image(), "label": Value("int64")})
        what = f"{IMAGES} fixed images of coloured noise"
    else:
        texts = list(SENTENCES)
        columns = {
            "causal_lm": {"text": texts},
            "seq2seq": {"source": texts, "target": texts[1:] + texts[:1]},
            "sequence_classification": {"text": texts, "label": [0] * len(texts)},
            "regression": {"text": texts, "label": [0.0] * len(texts)},
        }[kind]
        what = f"{len(texts)} fixed sentences"
    rows = Dataset.from_dict(columns, features=features)
    plain = make_task(dataclasses.replace(task.spec, columns={}, metrics=None))
    return Probe(plain, rows, batch_size, {"path": None, "what": what, "rows": len(rows)}, labelled=False)
