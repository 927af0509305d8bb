"""The batches of a comparison: functions of seed, step and rank, so that every arm sees the same ones in the same order."""

from __future__ import annotations

import gzip
import math
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from curvelora.errors import UserError

Batch = dict[str, Tensor]
HELD_OUT_SHARE = 0.05  # of a text that comes without held-out text of its own


class Source(ABC):
    """Batches on the CPU. `tokens` is how many positions a batch of one process has, or None where it varies."""

    tokens: int | None = None

    @abstractmethod
    def batch(self, seed: int, step: int, rank: int = 0, processes: int = 1) -> Batch:
        """The batch of one process in one step (counted from 0)."""

    def held_out(self, most: int) -> list[Batch]:
        """At most so many batches that training never sees; empty where there are none."""
        return []


class RandomTokens(Source):
    """Uniformly random token ids: for cost and numerics, where the loss says nothing."""

    def __init__(self, vocabulary: int, batch_size: int, length: int) -> None:
        self.vocabulary, self.shape = vocabulary, (batch_size, length)
        self.tokens = batch_size * length

    def batch(self, seed: int, step: int, rank: int = 0, processes: int = 1) -> Batch:
        draw = torch.Generator().manual_seed(zlib.crc32(f"{seed} {step} {rank}".encode()))
        ids = torch.randint(0, self.vocabulary, self.shape, generator=draw)
        return {"input_ids": ids, "labels": ids}


class _Shuffled(Source):
    """Items in a new random order each epoch; the processes of a step take neighbouring slices of it."""

    def __init__(self, count: int, held: list[int], batch_size: int, collate: Callable[[list[int]], Batch]) -> None:
        kept = set(held)
        self.items = [i for i in range(count) if i not in kept]
        self.held, self.batch_size, self.collate = held, batch_size, collate
        self._order: tuple[tuple[int, int], list[int]] | None = None

    def batch(self, seed: int, step: int, rank: int = 0, processes: int = 1) -> Batch:
        size = self.batch_size * processes
        steps = max(1, len(self.items) // size)
        epoch, position = divmod(step, steps)
        if self._order is None or self._order[0] != (seed, epoch):
            draw = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
            self._order = (seed, epoch), torch.randperm(len(self.items), generator=draw).tolist()
        start = position * size + rank * self.batch_size
        chosen = self._order[1]
        return self.collate([self.items[chosen[i % len(chosen)]] for i in range(start, start + self.batch_size)])

    def held_out(self, most: int) -> list[Batch]:
        groups = [self.held[i : i + self.batch_size] for i in range(0, len(self.held), self.batch_size)]
        return [self.collate(group) for group in groups[:most]]


class TextBlocks(_Shuffled):
    """A text as blocks of equal length, each predicted token by token. Its last blocks are held out.

    Raises:
        UserError: the text is too short for one batch and one held-out block.
    """

    def __init__(self, text: str, tokenizer: PreTrainedTokenizerBase, batch_size: int, length: int) -> None:
        ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
        blocks = ids[: len(ids) // length * length].view(-1, length)
        held = max(batch_size, math.ceil(len(blocks) * HELD_OUT_SHARE))
        if len(blocks) < 2 * batch_size:
            raise UserError(
                f"the text has {len(ids):,} tokens, which is less than two batches of {batch_size} x {length}: give more text, "
                "or a smaller --batch-size or --length"
            )

        def collate(chosen: list[int]) -> Batch:
            part = blocks[chosen]
            return {"input_ids": part, "labels": part}

        super().__init__(len(blocks), list(range(len(blocks) - held, len(blocks))), batch_size, collate)
        self.tokens = batch_size * length


class TaskRows(_Shuffled):
    """The encoded rows of a recipe's task, padded batch by batch.

    Args:
        train, test: datasets of features, as `Task.encode` gives them.
        collate: the task's collator.
    """

    def __init__(self, train: Any, test: Any | None, batch_size: int, collate: Callable[[list[Any]], Batch]) -> None:
        count, extra = len(train), 0 if test is None else len(test)
        rows = [train[i] for i in range(count)] + [test[i] for i in range(extra)]
        held = list(range(count, count + extra))
        super().__init__(count + extra, held, batch_size, lambda chosen: dict(collate([rows[i] for i in chosen])))


def read_text(path: str | None) -> tuple[str, str]:
    """(text, how reports call it); the text that comes with the package where no file is named.

    Raises:
        UserError: the file cannot be read as UTF-8 text.
    """
    if path is None:
        packed = (files("curvelora_training.bench") / "shakespeare.txt.gz").read_bytes()
        return gzip.decompress(packed).decode(), "Shakespeare (comes with the package)"
    try:
        raw = Path(path).read_bytes()
        if path.endswith(".gz"):
            raw = gzip.decompress(raw)
        return raw.decode("utf-8"), path
    except (OSError, EOFError, zlib.error) as error:
        why = getattr(error, "strerror", None) or error
        raise UserError(f"--data {path} cannot be read ({why}): name a UTF-8 text file") from error
    except UnicodeDecodeError as error:
        raise UserError(f"--data {path} is no UTF-8 text ({error.reason} at byte {error.start}): convert it") from error
