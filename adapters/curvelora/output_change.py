"""How much a model's outputs and loss change between two states: before training, or between an adapter and its merged form."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from curvelora.merging import merged_form

State = Callable[[], AbstractContextManager]


@dataclass(frozen=True)
class OutputChange:
    """From the reference state to the changed one.

    Args:
        relative: Frobenius norm of the difference of the logits over that of the reference's.
        largest: largest absolute difference of a logit.
        agreement: share of positions (rows, for a classifier) whose largest logit is the same; None for one output.
        reference_loss, changed_loss: mean of the losses of the batches; None where they have no labels.
        positions: how many positions were compared.
    """

    relative: float
    largest: float
    agreement: float | None
    reference_loss: float | None
    changed_loss: float | None
    positions: int

    def as_dict(self) -> dict[str, float | int | None]:
        """Plain data, for logs and JSON."""
        return asdict(self)


def start_shift(model: nn.Module, batches: Iterable[Mapping[str, Any]]) -> OutputChange:
    """From the base model to the model with its adapter; before training this is what the init changed.

    Args:
        model: a PEFT model.
        batches: keyword arguments of its forward pass, on its device; with `labels`, the loss is compared as well.
    """
    return output_change(model, batches, reference=model.disable_adapter, changed=contextlib.nullcontext)


def merge_gap(model: nn.Module, batches: Iterable[Mapping[str, Any]]) -> OutputChange:
    """From the adapter to its merged form, without touching a weight; zero, up to rounding, where merging is exact.

    Raises:
        UserError: an adapter that cannot be merged.
    """
    return output_change(model, batches, reference=contextlib.nullcontext, changed=lambda: merged_form(model))


@torch.no_grad()
def output_change(
    model: nn.Module, batches: Iterable[Mapping[str, Any]], reference: State, changed: State
) -> OutputChange:
    """Run every batch in both states of `model`, in evaluation mode, and compare; its mode is put back.

    Raises:
        ValueError: there is no batch.
    """
    was_training = model.training
    model.eval()
    squares = norm = 0.0
    largest, agreeing, positions, several = 0.0, 0, 0, False
    losses: list[tuple[float, float]] = []
    try:
        for batch in batches:
            with reference():
                before, loss_before = _run(model, batch)
            with changed():
                after, loss_after = _run(model, batch)
            difference = after - before
            squares += difference.square().sum().item()
            norm += before.square().sum().item()
            largest = max(largest, difference.abs().max().item())
            agreeing += (before.argmax(-1) == after.argmax(-1)).sum().item()
            positions += before.shape[0]
            several = before.shape[-1] > 1
            if loss_before is not None:
                losses.append((loss_before, loss_after))
    finally:
        model.train(was_training)
    if positions == 0:
        raise ValueError("there is no batch to compare outputs on")
    means = [sum(column) / len(losses) for column in zip(*losses, strict=True)] if losses else [None, None]
    return OutputChange(
        relative=(squares / norm) ** 0.5 if norm else 0.0 if squares == 0 else float("inf"),
        largest=largest,
        agreement=agreeing / positions if several else None,
        reference_loss=means[0],
        changed_loss=means[1],
        positions=positions,
    )


def _run(model: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, float | None]:
    """Logits as (positions, classes) in fp64, padding left out; and the loss, where the batch has labels."""
    output = model(**batch)
    logits, mask = output.logits.double(), batch.get("attention_mask")
    if mask is not None and logits.ndim == 3 and mask.shape == logits.shape[:2]:
        logits = logits[mask.bool()]
    loss = getattr(output, "loss", None)
    return logits.reshape(-1, logits.shape[-1]), None if loss is None else loss.item()
