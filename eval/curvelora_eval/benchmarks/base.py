"""What a named task is: where its rows come from, and the frozen protocols that turn them into a score.

A task is one small module with one `BENCHMARK`, and one line in `curvelora_eval.benchmarks.BENCHMARKS`. Nothing here needs
a model, a tokenizer or torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from curvelora.errors import UserError, nearest
from curvelora_eval.benchmarks.protocols.base import Protocol, Row

Kind = Literal[
    "multiple_choice",
    "arithmetic",
    "classification",
    "regression",
    "summarisation",
    "language_modelling",
    "instruction",
]
# other names that people use for a split
ALIASES = {"dev": "validation", "val": "validation", "valid": "validation"}


ANY_NUMBER = (-math.inf, math.inf)


@dataclass(frozen=True)
class Split:
    """One split of a task."""

    files: tuple[str, ...]
    """Where it may lie below the data folder; the first that exists counts, each also with .gz, .bz2 or .xz."""
    published: int
    """Rows (or what `Benchmark.unit` says) of the published set."""
    labelled: bool = True
    hub: str | None = None
    """The split's name on the hub, or None where the hub's data set has no such split."""
    note: str = ""


class Rows(list[Row]):
    """Rows of a file of which `left_out` lines could not be read and were not counted."""

    left_out: int = 0


@dataclass(frozen=True)
class Benchmark:
    """A named task."""

    name: str
    kind: Kind
    title: str
    source: str
    """Paper, address, licence words."""
    splits: Mapping[str, Split]
    default_split: str
    read: Callable[[Path, str], list[Row]]
    """(file, split) -> rows, as `Rows` where broken lines may be left out. Raises UserError for a damaged file."""
    protocols: Mapping[str, Protocol]
    """By name; the first is the default."""
    training: Protocol | None = None
    """How rows become training rows where no protocol scores them (training sets); otherwise the default protocol does."""
    hub: tuple[str, str | None] | None = None
    """Data set and config on the hub."""
    from_hub: Callable[[Mapping[str, Any], str], Row] | None = None
    """(hub row, id) -> row."""
    version: int = 1
    """Raised whenever the same files give other rows."""
    answers: tuple[str, ...] | None = None
    """The answers that a row may have; None where they are numbers or free text."""
    numbers: tuple[float, float] | None = None
    """(smallest, largest) where answers are numbers, which must be finite; None where they are none."""
    unit: str = "rows"
    """What `published` counts: rows, or lines of a text."""
    count: Callable[[list[Row]], int] = len
    take: Callable[[list[Row], int], list[Row]] = lambda rows, limit: rows[:limit]
    """The first so many of `unit`."""
    if_missing: Callable[[Path], str] | None = None
    """(data folder) -> what to add to the message that the file is not there."""
    notes: tuple[str, ...] = field(default=())
    """What somebody should know before believing a score."""

    def split(self, name: str | None) -> tuple[str, Split]:
        """The split called `name` (dev, val and valid mean validation), or the default one.

        Raises:
            UserError: the task has no such split.
        """
        wanted = name or self.default_split
        wanted = wanted if wanted in self.splits else ALIASES.get(wanted, wanted)
        if wanted not in self.splits:
            known = ", ".join(self.splits)
            raise UserError(
                f"{self.name} has no split {name!r}{nearest(wanted, self.splits)}: name one of its splits ({known})"
            )
        return wanted, self.splits[wanted]

    def protocol(self, name: str | None = None) -> Protocol:
        """The protocol called `name`, or the default one.

        Raises:
            UserError: the task has no such protocol, or none at all (training sets).
        """
        if not self.protocols:
            raise UserError(f"{self.name} is a training set: it can be trained on, and there is nothing to score")
        if name is None:
            return next(iter(self.protocols.values()))
        if name not in self.protocols:
            known = ", ".join(self.protocols)
            raise UserError(
                f"{self.name} has no protocol {name!r}{nearest(name, self.protocols)}: name one of its protocols ({known})"
            )
        return self.protocols[name]


@dataclass(frozen=True)
class LoadedRows:
    """The rows of one split, and how many of the published ones they are."""

    rows: list[Row]
    split: str
    path: str
    """File, or the hub's name."""
    sha256: str | None
    """Of the file; None for the hub."""
    n: int
    published: int
    unit: str = "rows"
    left_out: int = 0
    """Broken lines of the file, which are no rows."""
    hub_version: str | None = None
    """Commit (or fingerprint) of the hub's data set; None for a file."""

    @property
    def subset(self) -> str | None:
        """`subset 2180 of 3270` where rows are missing, else None."""
        return f"subset {self.n} of {self.published}" if self.n < self.published else None


__all__ = ["ALIASES", "ANY_NUMBER", "Benchmark", "Kind", "LoadedRows", "Row", "Rows", "Split"]
