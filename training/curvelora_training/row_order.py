"""The order of the training rows: it depends on the seed and the epoch, and not on how many processes share a step's rows.

transformers and Accelerate deal a shuffled epoch out in consecutive batches, so a step has the same rows for any number of
processes with the same product of processes, batch size and accumulation, but in three cases: an epoch's last, incomplete step
(filled up from its start to whole batches of all processes, and weighed batch by batch); rows grouped by length (by the batches
of one process, in an order drawn from each process's own random numbers); and an epoch after the first that several processes
resume in the middle (its number does not reach the sampler). Here every step is whole, the last filled up in this way too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import cycle, islice
from typing import Any

import torch
from torch.utils.data import Sampler
from transformers import TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer_pt_utils import get_length_grouped_indices

from curvelora.errors import UserError


class RowOrder(Sampler[int]):
    """Row numbers, epoch after epoch, in whole steps.

    Args:
        rows: how many there are.
        step: rows a step, over all processes.
        seed: of the run.
        lengths: of the rows, where rows of similar length shall come together.
    """

    def __init__(self, rows: int, step: int, seed: int, lengths: list[int] | None = None) -> None:
        self.rows, self.step, self.seed, self.lengths = rows, step, seed, lengths
        self.steps = math.ceil(rows / step)
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Which pass over the rows comes next, from 0."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.steps * self.step

    def __iter__(self) -> Iterator[int]:
        draw = torch.Generator().manual_seed(self.seed + self.epoch)
        if self.lengths is None:
            order = torch.randperm(self.rows, generator=draw).tolist()
        else:
            order = get_length_grouped_indices(self.lengths, self.step, generator=draw)
        return islice(cycle(order), len(self))


class EpochOfRows(TrainerCallback):
    """Tells the sampler its epoch, which transformers and Accelerate do not everywhere (see above)."""

    def __init__(self) -> None:
        self.order: RowOrder | None = None

    def on_epoch_begin(self, args: TrainingArguments, state: TrainerState, *_: Any, **__: Any) -> None:
        self.order.set_epoch(state.global_step // self.order.steps)


def share_step(rows: int, batch_size: int, processes: int) -> tuple[int, int]:
    """(batch size, accumulation) with which so many processes take `rows` a step: the batch size given, or the next below.

    Raises:
        UserError: they cannot have equal parts.
    """
    if rows % processes:
        others = [n for n in range(1, rows + 1) if rows % n == 0]
        near = [*[n for n in others if n < processes][-1:], *[n for n in others if n > processes][:1]]
        raise UserError(
            f"a step of this run has {rows} rows, which {processes} processes cannot share in equal parts: start "
            f"{' or '.join(map(str, near))}"
        )
    each = rows // processes
    size = next(size for size in range(min(batch_size, each), 0, -1) if each % size == 0)
    return size, each // size
