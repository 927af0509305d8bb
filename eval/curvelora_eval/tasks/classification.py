"""Text classification and regression: one score vector a row from a head on an encoder or decoder."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from transformers import AutoModelForSequenceClassification, DataCollatorWithPadding

from curvelora.errors import UserError, nearest
from curvelora_eval.tasks.base import Predictions, Task, batches_by_length, compute_context, device_of

MOST_CLASSES = 10_000  # more are a sign that an identifier was taken for a label
_WHOLE = re.compile(r"\s*-?[0-9]+\s*")


class LabelledTask(Task):
    """A task whose label is one of a fixed list of classes."""

    new_head = True
    default_metrics = possible_metrics = ("accuracy", "f1", "matthews")

    def learn_labels(self, rows: Dataset) -> None:
        """Take the class names from the training rows where the settings do not give them."""
        if self.spec.labels is not None:
            return
        names = self._stored_names(rows)
        if not names:
            found = set(self.values(rows, "label"))
            if found & {None, ""}:
                raise UserError("some training rows have no label: leave these rows out")
            if len(found) > 1 and all(_is_whole(value) for value in found):
                names = [str(i) for i in range(self._highest(found) + 1)]
            else:
                names = sorted(str(value) for value in found)
        if len(names) < 2:
            raise UserError(f"the training rows hold one class only ({names[0]!r}): a classifier needs at least two")
        self.spec.labels = list(names)

    def _stored_names(self, rows: Dataset) -> list[str]:
        """Class names that the data set itself stores (`ClassLabel`; image folders do), else an empty list."""
        feature = rows.features.get(self.roles(rows)["label"])
        return list(getattr(feature, "names", None) or [])

    @staticmethod
    def _highest(found: set[Any]) -> int:
        low, high = min(map(int, found)), max(map(int, found))
        if low < 0 or high >= MOST_CLASSES:
            raise UserError(
                f"the training rows have labels from {low} to {high}: whole numbers are taken as class indices, which count "
                f"from 0 and stay below {MOST_CLASSES:,}; name the classes in task.labels, or map another column to 'label'"
            )
        return high

    def label_indices(self, rows: Dataset, name: str) -> list[int]:
        """The class index of every row; whole numbers are indices, words are looked up among the labels.

        Raises:
            UserError: a label outside the range or not among the names; the row and the labels are in the message.
        """
        labels = self.spec.labels
        names = self._stored_names(rows)
        # a data set that names its classes is looked up by name, unless the settings give all of them other names
        renamed = len(names) == len(labels) and not set(names) & set(labels)
        indices = []
        for i, value in enumerate(self.values(rows, "label")):
            if names and not renamed and _is_whole(value) and 0 <= int(value) < len(names):
                value = names[int(value)]
                if value in labels:
                    indices.append(labels.index(value))
                    continue
                raise UserError(
                    f"{name}: row {i} has the label {value!r}{nearest(value, labels)} (labels: {', '.join(labels)})"
                )
            if not isinstance(value, bool) and str(value) in labels:
                indices.append(labels.index(str(value)))
            elif _is_whole(value) and 0 <= int(value) < len(labels):
                indices.append(int(value))
            elif _is_whole(value):
                raise UserError(
                    f"{name}: row {i} has the label {value}, outside 0..{len(labels) - 1} (labels: {', '.join(labels)})"
                )
            else:
                raise UserError(
                    f"{name}: row {i} has the label {value!r}{nearest(value, labels)} (labels: {', '.join(labels)})"
                )
        return indices

    def check(self, rows: Dataset, name: str) -> None:
        super().check(rows, name)
        self.label_indices(rows, name)

    def model_options(self) -> dict[str, Any]:
        labels = self.spec.labels
        if labels is None:  # not known yet: the number of classes has no influence on what is checked without them
            return {}
        return {"id2label": dict(enumerate(labels)), "label2id": {name: i for i, name in enumerate(labels)}}


class TextTask(Task):
    """Text, or a pair of texts, in; a score vector out."""

    required = ("text", "label")
    optional = ("text_pair",)
    auto_class = AutoModelForSequenceClassification
    new_head = True

    def tokenise(self, rows: Dataset, tokenizer: Any) -> dict[str, list[Any]]:
        """Token ids (and masks, types) of every row, cut at max_length."""
        texts = [[str(text) for text in self.values(rows, "text")]]
        if "text_pair" in self.roles(rows):
            texts.append([str(text) for text in self.values(rows, "text_pair")])
        return dict(tokenizer(*texts, truncation=True, max_length=self.spec.max_length))

    @abstractmethod
    def targets(self, rows: Dataset, name: str) -> list[Any]:
        """What the loss compares with, a row each."""

    def encode(self, rows: Dataset, processor: Any) -> Dataset:
        return Dataset.from_dict({**self.tokenise(rows, processor), "labels": self.targets(rows, "rows")})

    def collator(self, processor: Any) -> Callable[[list[dict[str, Any]]], dict[str, torch.Tensor]]:
        return DataCollatorWithPadding(processor)

    @abstractmethod
    def read_logits(self, logits: torch.Tensor) -> list[Any]:
        """Logits (rows, outputs) -> one prediction a row."""

    @torch.inference_mode()
    def predict(self, model: nn.Module, rows: Dataset, processor: Any, batch_size: int) -> Predictions:
        model.eval()
        encoded = self.tokenise(rows, processor)
        lengths = [len(ids) for ids in encoded["input_ids"]]
        predictions: list[Any] = [None] * len(lengths)
        for chosen in batches_by_length(lengths, batch_size, "evaluating"):
            batch = processor.pad({k: [v[i] for i in chosen] for k, v in encoded.items()}, return_tensors="pt")
            with compute_context(model):
                logits = model(**batch.to(device_of(model))).logits
            for i, prediction in zip(chosen, self.read_logits(logits.float()), strict=True):
                predictions[i] = prediction
        cut = sum(length >= self.spec.max_length for length in lengths)
        return Predictions(predictions, self.targets(rows, "rows"), {"rows": len(lengths), "at_max_length": cut})


class SequenceClassification(TextTask, LabelledTask):
    """Roles text, text_pair (optional), label."""

    def targets(self, rows: Dataset, name: str) -> list[int]:
        return self.label_indices(rows, name)

    def read_logits(self, logits: torch.Tensor) -> list[int]:
        return logits.argmax(-1).tolist()


class Regression(TextTask):
    """Roles text, text_pair (optional), label: a number."""

    default_metrics = possible_metrics = ("pearson_spearman",)

    def targets(self, rows: Dataset, name: str) -> list[float]:
        numbers = []
        for i, value in enumerate(self.values(rows, "label")):
            try:
                numbers.append(float(value))
            except (TypeError, ValueError):
                raise UserError(f"{name}: row {i} has the label {value!r}, and regression needs a number") from None
        return numbers

    def check(self, rows: Dataset, name: str) -> None:
        super().check(rows, name)
        self.targets(rows, name)

    def model_options(self) -> dict[str, Any]:
        return {"num_labels": 1, "problem_type": "regression"}

    def read_logits(self, logits: torch.Tensor) -> list[float]:
        return logits.squeeze(-1).tolist()


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) or (isinstance(value, str) and _WHOLE.fullmatch(value) is not None)
