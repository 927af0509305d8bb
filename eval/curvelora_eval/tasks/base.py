"""What every task kind can do with rows: check them, encode them for training, and predict on them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from datasets import Dataset
from torch import nn
from tqdm.auto import tqdm

from curvelora.errors import UserError, nearest
from curvelora_eval.data import columns_of, render
from curvelora_eval.spec import TaskSpec


@dataclass
class Predictions:
    """Predictions and references in row order; `counts` says what happened on the way (rows cut at max_length, ...)."""

    predictions: list[Any]
    references: list[Any]
    counts: dict[str, int] = field(default_factory=dict)


class Task(ABC):
    """One task kind bound to its settings. A kind is one subclass and one line in `curvelora_eval.tasks`.

    Args:
        spec: the settings; roles that are not mapped are looked up as columns of their own name.
    """

    required: ClassVar[tuple[str, ...]] = ()
    optional: ClassVar[tuple[str, ...]] = ()
    auto_class: ClassVar[Any]
    default_metrics: ClassVar[tuple[str, ...]] = ()
    possible_metrics: ClassVar[tuple[str, ...]] = ()
    """Metrics that mean something for this kind's predictions."""
    new_head: ClassVar[bool] = False
    """Whether the model gets a freshly initialised head, which then trains in full."""
    token_loss: ClassVar[bool] = False
    """Whether the models' loss is a mean over tokens that accepts `num_items_in_batch` and honours it."""

    def __init__(self, spec: TaskSpec) -> None:
        self.spec = spec

    @property
    def metrics(self) -> list[str]:
        """Names of the metrics to report; the first is the primary one."""
        return list(self.spec.metrics or self.default_metrics)

    def check_metrics(self) -> None:
        """Raise `UserError` where a metric is unknown, or compares what this kind does not predict."""
        for name in self.spec.metrics or []:
            if name not in self.possible_metrics:
                raise UserError(
                    f"unknown metric {name!r} for task {self.spec.kind}{nearest(name, self.possible_metrics)} "
                    f"(known here: {', '.join(self.possible_metrics)})"
                )

    def roles(self, rows: Dataset) -> dict[str, str]:
        """Role -> column or template, for the roles that these rows can fill.

        Raises:
            UserError: an unknown role, a required role without a column, or a column that does not exist.
        """
        known = (*self.required, *self.optional)
        for role in self.spec.columns:
            if role not in known:
                raise UserError(
                    f"task {self.spec.kind} has no role {role!r}{nearest(role, known)} (roles: {', '.join(known)})"
                )
        mapped = dict(self.spec.columns)
        for role in known:
            if role in rows.column_names:
                mapped.setdefault(role, role)
        for role in self.required:
            if role not in mapped:
                raise UserError(
                    f"task {self.spec.kind} needs a column for {role!r}: map it, for example `columns: {{{role}: "
                    f"{rows.column_names[0]}}}` (columns: {', '.join(rows.column_names)})"
                )
        for pattern in mapped.values():
            columns_of(pattern, rows.column_names)
        return mapped

    def values(self, rows: Dataset, role: str) -> list[Any]:
        """The values of one role, a row each."""
        pattern = self.roles(rows)[role]
        if pattern in rows.column_names:
            return list(rows[pattern])
        return [render(pattern, row) for row in rows]

    def check(self, rows: Dataset, name: str) -> None:
        """Check everything about these rows that can be checked without a model; `name` is for messages."""
        try:
            roles = self.roles(rows)
        except UserError as error:
            raise UserError(f"{name}: {error}") from error
        for role, pattern in roles.items():
            if pattern in rows.column_names and role not in ("label", "image"):
                empty = next((i for i, value in enumerate(rows[pattern]) if value is None), None)
                if empty is not None:
                    raise UserError(f"{name}: row {empty} has no {role} (column {pattern!r}): leave such rows out")

    def model_options(self) -> dict[str, Any]:
        """Keyword arguments for the model's config, for example num_labels."""
        return {}

    @abstractmethod
    def encode(self, rows: Dataset, processor: Any) -> Dataset:
        """Rows -> model inputs with labels, for training and for the loss."""

    @abstractmethod
    def collator(self, processor: Any) -> Callable[[list[dict[str, Any]]], dict[str, torch.Tensor]]:
        """Features -> one padded batch."""

    @abstractmethod
    def predict(self, model: nn.Module, rows: Dataset, processor: Any, batch_size: int) -> Predictions:
        """Predict every row; deterministic, in eval mode, whatever mode the model came in."""


def batches_by_length(lengths: Sequence[int], batch_size: int, title: str) -> Iterator[list[int]]:
    """Row indices in batches of similar length, longest first (a batch that does not fit in memory fails at once)."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    for start in tqdm(range(0, len(order), batch_size), desc=title, unit="batch"):
        yield order[start : start + batch_size]


def device_of(model: nn.Module) -> torch.device:
    """Where the model's inputs go."""
    return next(model.parameters()).device


def compute_context(model: nn.Module) -> torch.autocast:
    """Autocast to the base's half-precision dtype, as in training; nothing for an fp32 base."""
    dtype = model.config.dtype
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    half = dtype in (torch.bfloat16, torch.float16)
    return torch.autocast(device_of(model).type, dtype=dtype if half else torch.bfloat16, enabled=half)
