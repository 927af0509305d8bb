"""How much a model's outputs and loss change between two states: before training, or between an adapter and its merged form."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from curvelora.merging import merged_form

State = Callable[[], AbstractContextManager]
BLOCK = (
    1 << 22
)  # logits that are compared at a time: their fp64 copies would outgrow the model where the vocabulary is large
IGNORED = -100  # the label of positions that do not count


class Outputs(NamedTuple):
    """What a model gave for one batch: logits (positions, classes) in their own dtype; the loss, or None without labels."""

    logits: Tensor
    loss: float | None


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


class Comparison:
    """Adds up the change of outputs, batch by batch: `add` each, then `result`."""

    def __init__(self) -> None:
        self._squares = self._norm = 0.0
        self._largest: list[float] = []
        self._agreeing = self._positions = 0
        self._several = False
        self._losses: list[tuple[float, float]] = []

    def add(self, reference: Outputs, changed: Outputs) -> None:
        """Compare one batch in the two states.

        Raises:
            ValueError: the two have different shapes.
        """
        if reference.logits.shape != changed.logits.shape:
            raise ValueError(
                f"outputs of different shapes: {tuple(reference.logits.shape)} and {tuple(changed.logits.shape)}"
            )
        positions, classes = reference.logits.shape
        rows = max(1, BLOCK // max(1, classes))
        for before, after in zip(reference.logits.split(rows), changed.logits.split(rows), strict=True):
            before, after = before.double(), after.double()
            difference = after - before
            self._squares += difference.square().sum().item()
            self._norm += before.square().sum().item()
            if difference.numel():
                self._largest.append(difference.abs().max().item())
                self._agreeing += (before.argmax(-1) == after.argmax(-1)).sum().item()
        self._positions += positions
        self._several = classes > 1
        if reference.loss is not None and changed.loss is not None:
            self._losses.append((reference.loss, changed.loss))

    def result(self) -> OutputChange:
        """The change over everything that was added.

        Raises:
            ValueError: there was no position.
        """
        if self._positions == 0:
            raise ValueError("there is no batch to compare outputs on")
        squares, norm, losses = self._squares, self._norm, self._losses
        means = [sum(column) / len(losses) for column in zip(*losses, strict=True)] if losses else [None, None]
        return OutputChange(
            relative=(squares / norm) ** 0.5 if norm else 0.0 if squares == 0 else float("inf"),
            # by torch, because Python's max() drops a NaN
            largest=torch.tensor(self._largest, dtype=torch.float64).max().item(),
            agreement=self._agreeing / self._positions if self._several else None,
            reference_loss=means[0],
            changed_loss=means[1],
            positions=self._positions,
        )


def start_shift(model: nn.Module, batches: Iterable[Mapping[str, Any]]) -> OutputChange:
    """From the base model to the model with its adapter; before training this is what the init changed.

    Args:
        model: a PEFT model.
        batches: keyword arguments of its forward pass, on its device; with `labels`, the loss is compared as well.
    """
    # PEFT refuses to disable what trains in the base itself and added nothing: full fine-tuning
    adapted = any(isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper) for module in model.modules())
    reference = model.disable_adapter if adapted else contextlib.nullcontext
    return output_change(model, batches, reference=reference, changed=contextlib.nullcontext)


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
    comparison = Comparison()
    with _evaluating(model):
        for batch in batches:
            with reference():
                before = _run(model, batch)
            with changed():
                after = _run(model, batch)
            comparison.add(before, after)
    return comparison.result()


@torch.no_grad()
def outputs(model: nn.Module, batches: Iterable[Mapping[str, Any]]) -> Iterator[Outputs]:
    """What `model` gives for every batch, in evaluation mode and on the CPU, to be kept until another model is compared."""
    with _evaluating(model):
        for batch in batches:
            logits, loss = _run(model, batch)
            yield Outputs(logits.cpu(), loss)


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode; the mode that was there is put back."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _run(model: nn.Module, batch: Mapping[str, Any]) -> Outputs:
    output = model(**batch)
    logits = output.logits
    mask = _counted(model, batch)
    if mask is not None and logits.ndim == 3 and mask.shape == logits.shape[:2]:
        logits = logits[mask]
    loss = getattr(output, "loss", None)
    return Outputs(logits.reshape(-1, logits.shape[-1]), None if loss is None else loss.item())


def _counted(model: nn.Module, batch: Mapping[str, Any]) -> Tensor | None:
    """True where a position is no padding. The mask of an encoder-decoder is of its input, its logits are of the labels."""
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        labels = batch.get("labels")
        return None if labels is None else labels != IGNORED
    mask = batch.get("attention_mask")
    return None if mask is None else mask.bool()
