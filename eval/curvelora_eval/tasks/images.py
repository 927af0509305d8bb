"""Image classification: one class an image."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from transformers import AutoModelForImageClassification, DefaultDataCollator

from curvelora_eval.tasks.base import Predictions, batches_by_length, compute_context, device_of
from curvelora_eval.tasks.classification import LabelledTask


class ImageClassification(LabelledTask):
    """Roles image and label; images are decoded and resized when they are needed, never all at once."""

    required = ("image", "label")
    auto_class = AutoModelForImageClassification
    default_metrics = ("accuracy", "f1")

    def encode(self, rows: Dataset, processor: Any) -> Dataset:
        roles = self.roles(rows)
        labels = self.label_indices(rows, "rows")
        numbered = rows.select_columns([roles["image"]]).add_column("labels", labels)

        def transform(batch: dict[str, list[Any]]) -> dict[str, Any]:
            pixels = self.pixels(batch[roles["image"]], processor)
            return {"pixel_values": list(pixels), "labels": batch["labels"]}

        return numbered.with_transform(transform)

    def pixels(self, images: list[Any], processor: Any) -> torch.Tensor:
        """PIL images of any size and mode -> (images, 3, height, width), normalised as the checkpoint expects."""
        return processor([image.convert("RGB") for image in images], return_tensors="pt")["pixel_values"]

    def collator(self, processor: Any) -> Callable[[list[dict[str, Any]]], dict[str, torch.Tensor]]:
        return DefaultDataCollator()

    @torch.inference_mode()
    def predict(self, model: nn.Module, rows: Dataset, processor: Any, batch_size: int) -> Predictions:
        model.eval()
        column = self.roles(rows)["image"]
        predictions: list[Any] = [None] * len(rows)
        for chosen in batches_by_length([1] * len(rows), batch_size, "evaluating"):
            pixels = self.pixels([rows[i][column] for i in chosen], processor).to(device_of(model))
            with compute_context(model):
                logits = model(pixel_values=pixels).logits
            for i, prediction in zip(chosen, logits.argmax(-1).tolist(), strict=True):
                predictions[i] = prediction
        return Predictions(predictions, self.label_indices(rows, "rows"), {"rows": len(rows)})
