"""What an adapter does to the model's outputs beside learning: at its start, and when it is merged."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel

from curvelora.merging import Merge
from curvelora.output_change import OutputChange, merge_gap, start_shift
from curvelora_eval.tasks.base import compute_context, device_of
from curvelora_eval.wording import percent
from curvelora_training.config import Recipe
from curvelora_training.run_folder import RunFolder

START_ROWS, GAP_ROWS = 32, 512


def measure_start(model: PeftModel, encoded: Dataset, collate: Callable, batch_size: int) -> OutputChange:
    """Change of outputs and loss from the base to the untrained adapter, on the first rows in file order.

    In evaluation mode and without drawing a random number, so training goes on as it would have.
    """
    with compute_context(model):
        return start_shift(model, batches(model, encoded, collate, batch_size, START_ROWS))


def merges_approximately(recipe: Recipe, model: PeftModel) -> bool:
    """Whether merging would give another function."""
    return recipe.method.merge(model.peft_config["default"]) is Merge.APPROXIMATE


def measure_gap(model: PeftModel, encoded: Dataset, collate: Callable, batch_size: int) -> OutputChange:
    """Change from the adapter to its merged form, on the first rows."""
    with compute_context(model):
        return merge_gap(model, batches(model, encoded, collate, batch_size, GAP_ROWS))


def describe_start(shift: OutputChange) -> str:
    """One line for people."""
    if shift.relative == 0:
        return "before training the model with its adapter is the base model"
    if not math.isfinite(shift.relative):
        return "before training the outputs are not finite"
    loss = "" if shift.reference_loss is None else f" (loss {shift.reference_loss:.4f} -> {shift.changed_loss:.4f})"
    return f"before training the adapter changes the outputs by {percent(shift.relative)}{loss}"


def last_spline(folder: RunFolder) -> dict[str, float] | None:
    """The last logged shares of spline inputs, also where a resumed run had no step left to make; None without a spline."""
    shares = {name: folder.logged(f"spline_{name}") for name in ("beyond_grid", "beyond_support")}
    return None if None in shares.values() else shares


def batches(
    model: PeftModel, encoded: Dataset, collate: Callable, batch_size: int, rows: int
) -> Iterator[dict[str, torch.Tensor]]:
    """The first `rows` of `encoded` in batches, on the model's device."""
    device = device_of(model)
    for start in range(0, min(rows, len(encoded)), batch_size):
        chosen: list[Any] = [encoded[i] for i in range(start, min(start + batch_size, rows, len(encoded)))]
        yield {name: tensor.to(device) for name, tensor in collate(chosen).items()}
