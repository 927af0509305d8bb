"""What a predictor is: one protocol's questions to a model, cut into units that can be padded together in any batch."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

from torch import nn

Output = dict[str, Any]
"""What the model said about one unit, as values that JSON can hold."""
UNLIMITED = 1 << 24  # tokenizers without a limit of their own say a number beyond this


class Predictor(ABC):
    """The questions of one protocol about some rows, tokenised.

    A unit is what takes one place in a batch: a prompt, a choice of a row, a window of a text. Rows that are over the model's
    limit have no unit.
    """

    lengths: list[int]
    """Tokens of each unit."""
    over_limit: set[int]
    """Rows (by position) that do not fit into the model."""
    counted: ClassVar[str] = "input"
    """Which tokens a rate counts: `input` or `new`."""

    @abstractmethod
    def predict(self, model: nn.Module, units: Sequence[int]) -> list[Output]:
        """One output a unit, from one batch; `model` is in eval mode, and autocast is on where it should be."""

    @abstractmethod
    def records(self, outputs: dict[int, Output]) -> list[dict[str, Any]]:
        """A prediction record of every row all of whose units are in `outputs` (unit -> output), rows over the limit among them."""

    @property
    def decoding(self) -> dict[str, Any] | None:
        """How text is generated; None where none is."""
        return None

    def tokens(self, units: Sequence[int], outputs: Sequence[Output]) -> int:
        """How many tokens a batch dealt with."""
        return sum(self.lengths[unit] for unit in units)

    @abstractmethod
    def differs(self, first: Output, second: Output) -> tuple[bool, float | None]:
        """Whether two outputs of one unit are different answers, and by how much their numbers differ (None for text)."""


def context_limit(config: Any, tokenizer: Any = None) -> int | None:
    """The most tokens that a model takes at once, by its config and its tokenizer; None where neither says."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    limits = [getattr(text, name, None) for name in ("max_position_embeddings", "n_positions", "max_sequence_length")]
    limits.append(getattr(tokenizer, "model_max_length", None))
    known = [int(limit) for limit in limits if isinstance(limit, int | float) and 0 < limit < UNLIMITED]
    return min(known, default=None)


def finite(value: float) -> float | None:
    """`value`, or None where it is not a number that JSON can hold."""
    return value if math.isfinite(value) else None
